"""Ranges, grids and rounding against numpy, and what the tensors get that have no plain range."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from nmlightning.errors import InputError
from nmlightning.int8 import quantizer
from nmlightning.int8.quantizer import (
    BITS,
    Grid,
    check_bits,
    cosine_bound,
    dequantize,
    direction_cosine,
    extreme,
    make_grid,
    quantize,
    sample_mean,
    symmetric_grid,
)

TINY = np.finfo(np.float32).tiny
TENSORS = {
    "Gaussian": torch.randn(64, 33, generator=torch.Generator().manual_seed(1)),
    "one-sided": torch.rand(64, 33, generator=torch.Generator().manual_seed(2)) + 3,
    "negative": -torch.rand(64, 33, generator=torch.Generator().manual_seed(3)) - 3,
    "constant": torch.full((4, 5), 0.7),
    "zero": torch.zeros(4, 5),
    "small": 1e-8 * torch.randn(64, 33, generator=torch.Generator().manual_seed(4)),
    "smallest normal": 1e-37 * torch.randn(64, 33, generator=torch.Generator().manual_seed(5)),
    "denormal": torch.tensor([[1e-40, -3e-40, 0.0, 1.4e-45]]),
    "largest": torch.tensor([[2e38, -2e38, 1e38, 0.0]]),
    "half": torch.randn(8, 9, generator=torch.Generator().manual_seed(6)).half(),
}


def numpy_grid(low: np.float32, high: np.float32, bits: int) -> tuple[np.float32, np.float32]:
    levels = np.float32(2**bits - 1)
    low, high = min(low, np.float32(0)), max(high, np.float32(0))
    scale = np.float32(high / levels - low / levels)
    scale = max(scale, np.float32(TINY)) if scale > 0 else np.float32(1)
    return scale, np.rint(-low / scale)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", TENSORS)
def test_grid_and_numbers_are_those_of_numpy(name: str, bits: int) -> None:
    x = TENSORS[name]
    grid = make_grid(*extreme(x), bits)
    values = x.numpy().astype(np.float32)
    scale, zero_point = numpy_grid(values.min(), values.max(), bits)
    assert (grid.scale.item(), grid.zero_point.item()) == (scale, zero_point)
    expected = np.clip(np.rint(values / scale) + zero_point, 0, 2**bits - 1)
    q = quantize(x, grid)
    assert q.dtype == torch.uint8
    np.testing.assert_array_equal(q.numpy(), expected)
    # Half a step, which the ends may miss by one rounding of z.
    assert (dequantize(q, grid) - x.float()).abs().max() <= grid.scale * 0.5001


def test_zero_is_on_every_grid() -> None:
    x = torch.cat([torch.zeros(100), torch.randn(100)]).view(2, 100)
    for bits in BITS:
        grid = make_grid(*extreme(x), bits)
        for rounding in ("nearest", "stochastic"):
            assert (dequantize(quantize(x, grid, rounding), grid)[0] == 0).all()


def test_mean_range_of_samples_is_that_of_numpy() -> None:
    x = torch.randn(8, 3, 5, 5)
    rows = x.numpy().reshape(8, -1)
    low, high = sample_mean(x)
    torch.testing.assert_close(low.item(), float(rows.min(1).mean()))
    torch.testing.assert_close(high.item(), float(rows.max(1).mean()))
    assert (
        [end.tolist() for end in sample_mean(x[:0])] == [0.0, 0.0] == [*map(float, extreme(x[:0]))]
    )
    assert sample_mean(x[:, 0, 0, 0])[0] == x[:, 0, 0, 0].mean()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("find_range", [extreme, sample_mean])
def test_a_value_that_is_not_finite_makes_all_nan(value: float, find_range: type) -> None:
    x = torch.randn(4, 5)
    x[1, 2] = value
    grid = make_grid(*find_range(x), 8)
    assert dequantize(quantize(x, grid), grid).isnan().all()
    assert dequantize(quantize(x, grid, "stochastic"), grid).isnan().all()


@pytest.mark.parametrize("size", [1.0, 1e-8])
@pytest.mark.parametrize("bits", [2, 8])
def test_stochastic_rounding_has_the_mean_of_what_is_rounded(size: float, bits: int) -> None:
    x = size * torch.linspace(-1, 1, 21)
    grid, n = make_grid(*extreme(x), bits), 40_000
    rounded = dequantize(quantize(x.expand(n, -1), grid, "stochastic"), grid).double()
    places = x / grid.scale + grid.zero_point
    inside = (places >= 0) & (places <= grid.levels)  # the ends may be half a step outside
    assert inside.sum() > 15
    steps = (rounded.mean(0) - x) / grid.scale
    # One rounding has σ ≤ ½ step.
    assert steps[inside].abs().max() < 5 * 0.5 / math.sqrt(n)


def test_random_numbers_are_of_the_generator_and_the_stream() -> None:
    x = torch.randn(4, 7, 3, 3).contiguous(memory_format=torch.channels_last)
    grid = make_grid(*extreme(x), 3)

    def draw(seed: int, stream: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return quantize(x, grid, "stochastic", generator, stream)

    assert torch.equal(draw(1, 0), draw(1, 0))
    assert draw(1, 0).stride() == x.stride()
    for other in (draw(2, 0), draw(1, 1), draw(1, 7)):
        assert 0.1 < (other != draw(1, 0)).float().mean() < 0.9
    torch.manual_seed(3)
    first = quantize(x, grid, "stochastic")
    torch.manual_seed(3)
    assert torch.equal(first, quantize(x, grid, "stochastic"))


def test_compiled_code_draws_other_numbers_on_each_rank() -> None:
    x, grid = torch.full((10_000,), 0.5), Grid(torch.tensor(1.0), torch.tensor(3.0), 3)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def draw(stream: int) -> Tensor:
        return quantize(x, grid, "stochastic", stream=stream).float()

    drawn = []
    for stream in (0, 1):
        torch.manual_seed(3)
        drawn.append(draw(stream))
    # Means of so many coins: σ = 0.005.
    assert [float(each.mean()) for each in drawn] == pytest.approx([3.5, 3.5], abs=0.025)
    assert float((drawn[0] == drawn[1]).float().mean()) == pytest.approx(0.5, abs=0.025)


@pytest.mark.parametrize("bits", BITS)
def test_a_weight_has_whole_signed_numbers_of_its_bits(bits: int) -> None:
    weight = torch.randn(6, 5, 3, 3) * torch.arange(6.0).view(-1, 1, 1, 1)
    for per_channel in (False, True):
        grid = symmetric_grid(weight, bits, per_channel)
        assert grid.scale.shape == ((6, 1, 1, 1) if per_channel else ())
        assert (grid.zero_point == 2 ** (bits - 1)).all()
        largest = weight.abs().amax((1, 2, 3)) if per_channel else weight.abs().max()
        # That of a channel of zeros is the least of the others'.
        largest = largest.where(largest > 0, largest[largest > 0].min())
        expected = 2 * largest / (2**bits - 1)
        torch.testing.assert_close(grid.scale.flatten(), expected.view(-1))
        error = (dequantize(quantize(weight, grid), grid) - weight).abs()
        assert (error <= grid.scale * 0.5001).all()


@pytest.mark.parametrize("bits", BITS)
def test_direction_is_kept_as_well_as_the_bound_says(bits: int) -> None:
    tensors = [torch.randn(10_000) for _ in range(20)]
    for grid in (lambda x: make_grid(*extreme(x), bits), lambda x: symmetric_grid(x, bits)):
        mean = sum(direction_cosine(x, grid(x)).item() for x in tensors) / len(tensors)
        # It is of the expectation. At 2 bits the mean over ±max|x| is 0.767, σ = 0.03 each.
        assert cosine_bound(bits, 10_000) - (0.02 if bits == 2 else 0) < mean < 1
    small = 1e-30 * tensors[0]
    kept = [direction_cosine(x, make_grid(*extreme(x), bits)).item() for x in (small, tensors[0])]
    assert kept[0] == pytest.approx(kept[1], rel=1e-3)  # s rounds otherwise
    assert direction_cosine(torch.zeros(3), make_grid(*extreme(torch.zeros(3)), bits)) == 1


@pytest.mark.parametrize("per_channel", [False, True])
def test_direction_is_that_of_what_is_dequantized(
    per_channel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizer, "_AT_ONCE", 7)
    weight = torch.randn(6, 5, 3) * torch.arange(6.0).view(-1, 1, 1)
    weight = weight.transpose(1, 2)  # of another layout than its parts
    grid = symmetric_grid(weight, 3, per_channel)
    kept = dequantize(quantize(weight, grid), grid).double().flatten()
    expected = torch.cosine_similarity(weight.double().flatten(), kept, dim=0)
    torch.testing.assert_close(direction_cosine(weight, grid), expected, rtol=1e-6, atol=0)


def test_no_direction_is_left_where_all_is_rounded_to_0() -> None:
    grid = make_grid(torch.tensor(-1.0), torch.tensor(1.0), 8)
    assert direction_cosine(torch.full((5,), 1e-3), grid) == 0
    assert direction_cosine(torch.tensor([1.0, torch.nan]), grid).isnan()


@pytest.mark.parametrize(
    ("bits", "expected"), [(2, 0.764), (3, 0.866), (4, 0.928), (6, 0.981), (8, 0.995)]
)
def test_the_bound_is_the_published_one(bits: int, expected: float) -> None:
    assert cosine_bound(bits, 10_000) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("bits", [1, 9, 2.5, True, "8"])
def test_bits_are_2_to_8(bits: object) -> None:
    with pytest.raises(InputError, match="gradient_bits is a whole number of 2 … 8, got"):
        check_bits("gradient_bits", bits)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="bits is a whole number of 2 … 8, got"):
        make_grid(torch.tensor(-1.0), torch.tensor(1.0), bits)  # type: ignore[arg-type]


def test_rounding_is_one_of_two() -> None:
    grid = make_grid(torch.tensor(-1.0), torch.tensor(1.0), 8)
    with pytest.raises(InputError, match=r"rounding is 'nearest' or 'stochastic', got 'floor'\."):
        quantize(torch.ones(3), grid, "floor")  # type: ignore[arg-type]
