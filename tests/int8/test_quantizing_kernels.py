"""The passes in C++ give what the formula gives, bit by bit, in any layout and on two threads."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nmlightning.int8 import Int8Conv2d, backends
from nmlightning.int8 import quantizer as q8
from nmlightning.int8.quantizer import BITS, Grid
from nmlightning.kernels import norm_backend
from nmlightning.kernels.dispatch import quantizing_kernels

pytestmark = pytest.mark.usefixtures("_kernels")
SHAPES: dict[str, Callable[[], Tensor]] = {
    "NCHW": lambda: torch.randn(3, 64, 7, 7),
    "NHWC": lambda: torch.randn(3, 40, 5, 9).contiguous(memory_format=torch.channels_last),
    "images": lambda: torch.randn(2, 3, 33, 31),
    "kernels": lambda: torch.randn(33, 18, 3, 3),
    "NDHWC": lambda: torch.randn(2, 17, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d),
    "NCDHW": lambda: torch.randn(2, 17, 3, 4, 5),
    "NCL": lambda: torch.randn(4, 19, 23),
    "rows": lambda: torch.randn(21, 70),
    "columns": lambda: torch.randn(21, 70).T,
    "vector": lambda: torch.randn(35),
    "pixels": lambda: torch.randn(5, 20, 1, 1),
    "large": lambda: torch.randn(2, 24, 64, 64),
    "not dense": lambda: torch.randn(4, 6, 9, 8)[:, ::2, :, 1:],
    "permuted": lambda: torch.randn(4, 6, 9, 8).permute(2, 0, 3, 1),
    "negative": lambda: torch.randn(4, 6, dtype=torch.complex64).conj().imag,
    "empty": lambda: torch.randn(0, 3, 4, 4),
    "zero": lambda: torch.zeros(2, 20, 5, 5),
    "constant": lambda: torch.full((2, 20, 5, 5), -0.3),
    "denormal": lambda: torch.full((2, 20, 5, 5), 1e-40) * torch.randn(5),
    "infinite": lambda: torch.randn(2, 20, 5, 5).index_fill_(3, torch.tensor(2), torch.inf),
    "NaN": lambda: torch.randn(2, 20, 5, 5).index_fill_(1, torch.tensor(17), torch.nan),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def both(compute: Callable[[], Any]) -> tuple[Any, Any]:
    """Return what kernels and the formula compute, from one seed."""
    torch.manual_seed(7)
    found = compute()
    torch.manual_seed(7)
    with norm_backend("formula"):
        return found, compute()


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, check_stride=True)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_q_is_that_of_the_formula(name: str, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    x = SHAPES[name]().to(dtype)
    for find in (q8.extreme, q8.sample_mean):
        for found, expected in zip(*both(lambda find=find: find(x)), strict=True):
            assert_equal(found, expected)
    for bits in BITS if dtype == torch.float32 and threads == 1 else (2, 8):
        grid = q8.make_grid(*q8.extreme(x), bits)
        grid = Grid(grid.scale.nan_to_num(0.1), grid.zero_point, bits)
        for last in (None, False, True):
            for rounding, stream in (("nearest", 0), ("stochastic", 0), ("stochastic", 9)):
                options = {"rounding": rounding, "stream": stream, "channels_last": last}
                assert_equal(*both(lambda o=options, g=grid: q8.quantize(x, g, **o)))
    if x.numel() and x.dim() != 1:
        for each in (False, True):
            grid = q8.symmetric_grid(x, 8, each)
            assert_equal(*both(lambda e=each: q8.symmetric_grid(x, 8, e).scale))
            assert_equal(*both(lambda g=grid: q8.quantize_signed(x, g)))


@pytest.mark.parametrize("size", [(6, 1), (6, 1, 1, 1), (1, 6, 1, 1)])
def test_grids_of_several_scales_are_those_of_the_formula(size: tuple[int, ...]) -> None:
    x = torch.randn(6, *[6, 5, 7][: len(size) - 1])
    grid = Grid(0.01 + torch.rand(size), torch.arange(6.0).view(size) * 30, 8)
    for rounding in ("nearest", "stochastic"):
        q, expected = both(lambda r=rounding: q8.quantize(x, grid, r))
        assert_equal(q, expected)
    assert_equal(*both(lambda: q8.dequantize(q, grid)))
    assert_equal(*both(lambda: q8.centre(q, grid, torch.float32)))
    assert_equal(*both(lambda: q8.direction_cosine(x, grid)))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_elements_are_laid_out_and_centred_as_by_the_formula(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    x, factor = SHAPES[name](), torch.tensor(0.37)
    q = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    grid = Grid(factor, torch.tensor(131.0), 8)
    for dtype in (torch.float32, torch.bfloat16):
        assert_equal(*both(lambda d=dtype: q8.centre(q, grid, d)))
        for last in (False, True):
            for own in (x, x.bfloat16()):
                arguments = (own, dtype, last)
                assert_equal(*both(lambda a=arguments: q8.lay_out(*a)))
    narrow = x.bfloat16()
    assert_equal(*both(lambda: q8.lay_out(narrow, torch.float32, True, factor)))


@pytest.mark.parametrize("shape", [(40, 33, 3, 3), (3, 5, 7, 1), (20, 17, 2, 3, 2), (6, 7, 1, 1)])
def test_kernels_are_flipped(shape: tuple[int, ...]) -> None:
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    weight = torch.randint(-128, 128, shape).to(torch.int8).contiguous(memory_format=last)
    found, expected = both(lambda: backends._flip_kernels(weight.unsqueeze(0)))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert quantizing_kernels(weight).flip_kernels(weight).is_contiguous(memory_format=last)


@pytest.mark.parametrize("backend", ["auto", "formula"])
def test_random_bits_are_those_of_splitmix64(backend: Any) -> None:
    def fill(seed: Tensor, *_: Any, **__: Any) -> Tensor:
        return seed.zero_()

    with norm_backend(backend), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "random_", fill)
        bits = q8._random_bits(torch.empty(11), None, 0)[:11].tolist()
    published = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)  # of seed 0
    words = [word >> shift & 0xFFFF for word in published for shift in (0, 16, 32, 48)]
    assert [each % 2**16 for each in bits] == words[:11]


def test_kernels_leave_to_the_formula_what_they_are_not_for() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    kernels, grid = quantizing_kernels(x), q8.make_grid(*q8.extreme(x.detach()), 8)
    for other in (x, x.detach()[:, 1:], x.detach().double(), x.detach().half()):
        assert kernels.ends(other, True) is None
        assert kernels.quantize(other, None, grid.scale, grid.zero_point, 255, False, None) is None
    assert kernels.ends(x.detach(), True) is not None
    assert quantizing_kernels(x.to("meta")) is None
    with norm_backend("formula"):
        assert quantizing_kernels(x) is None


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [2, 3, 40])
@pytest.mark.parametrize("weight_gradient", ["float32", "bfloat16"])
def test_few_places_and_many_give_the_layer_of_the_formula(
    stride: int, size: int, weight_gradient: Any
) -> None:
    layer = Int8Conv2d(
        16, 24, 3, stride, 1, weight_gradient=weight_gradient, weight_range="channel"
    )
    x = torch.randn(2, 16, size, size + 1, requires_grad=True)
    expected = backends.INT_MM if size < 40 else backends.ONEDNN
    assert layer.backend_for(x).backend in (expected, "formula")  # as the CPU has it

    def step() -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, layer.weight])]

    for found, exact in zip(*both(step), strict=True):
        largest = float(exact.detach().abs().max())
        # y²'s gradient is 2y, with other roundings; 8 bits of mantissa in bfloat16.
        rounding = 1e-2 if weight_gradient == "bfloat16" else 1e-4
        assert (found - exact).abs().max() <= rounding * largest
