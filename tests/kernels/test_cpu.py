"""The kernels in C++ against the definition in float64, and the layers that they serve."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import kernel_contract
from nmlightning import norms, swap_norms
from nmlightning.functional.constants import gaussian_constant
from nmlightning.functional.statistics import LargestMean, PowerMean, RangeMean, Statistic
from nmlightning.kernels import DispatchKey, norm_backend, select_backend
from nmlightning.kernels.cpu.backend import CpuBatchNorm
from nmlightning.kernels.interface import Fused
from nmlightning.parametrizations.normalize import normalise_weight


@dataclass(frozen=True)
class MadeUpMean:
    """A statistic that no backend knows."""

    name: str = "the made-up mean"


pytestmark = pytest.mark.usefixtures("_kernels")
CONSTANT, EPS = gaussian_constant("lp", 100, p=1), 1e-5


@pytest.fixture(params=[1, 2])
def _threads(request: pytest.FixtureRequest, _kernels: None) -> None:
    torch.set_num_threads(request.param)  # which `_kernels` takes back


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("case", [*kernel_contract.CASES, *kernel_contract.WIDTHS], ids=str)
def test_kernels_equal_the_definition(case: kernel_contract.Case) -> None:
    kernel_contract.check(case, CpuBatchNorm())


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_operator_leaves_unbounded_sums_to_the_formula(k: int, value: float) -> None:
    x, state = torch.randn(20, 3), [torch.zeros(3), torch.ones(3), torch.tensor(0)]
    x[4, 1] = value
    assert (
        torch.ops.nmlightning.batch_norm(k, x, None, None, None, *state, 1.0, EPS, 0.1, None) == []
    )
    assert state[0].tolist() == [0, 0, 0]
    assert state[2] == 0
    assert not any(tensor._version for tensor in state)


@pytest.mark.parametrize(
    ("shape", "channels_last"), [((3, 4, 5, 2), False), ((3, 4, 5, 2), True), ((9, 4), False)]
)
def test_stages_equal_the_definition(shape: tuple[int, ...], channels_last: bool) -> None:
    kernel_contract.check_stages(shape, channels_last, CpuBatchNorm())


def test_kernels_round_to_bfloat16_as_torch() -> None:
    """All upper halves of a float, with lower halves around a tie, as biases of 0."""
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    bits = (torch.arange(2**16, dtype=torch.int32)[:, None] << 16 | lower).flatten()
    bias, zeros = bits.view(torch.float32), torch.zeros(len(bits))
    found = CpuBatchNorm().affine(zeros[None].bfloat16(), None, zeros, zeros, bias, None)[0]
    torch.testing.assert_close(found, bias.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(64, 1, 24, 24), (16, 24, 30, 30), (40, 65, 16, 16)])
@pytest.mark.parametrize("statistic", [PowerMean(1.0), LargestMean(3)])
def test_threads_do_not_change_a_bit(
    shape: tuple[int, ...], channels_last: bool, statistic: Statistic
) -> None:
    case = kernel_contract.Case(shape, fused="add_relu", channels_last=channels_last)
    (inputs, grad), found = kernel_contract.draw(case, "cpu"), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        step = kernel_contract.run(CpuBatchNorm(), statistic, inputs, grad, "add_relu")
        found.append([step.y, step.mean, step.variance, *step.gradients])
    assert all(map(torch.equal, *found))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("shape", [(3, 20, 7, 7), (2, 37, 33, 5), (40, 5), (64, 3, 16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("chunks", [1, 7])
def test_range_is_that_of_the_formula(
    shape: tuple[int, ...], dtype: torch.dtype, last: bool, chunks: int
) -> None:
    make = norms.RangeBatchNorm2d if len(shape) == 4 else norms.RangeBatchNorm1d
    x, grad, found = torch.randn(shape).to(dtype) + 3, torch.randn(shape).to(dtype), []
    x[1] = x[0]  # so that the first of equals counts
    if last and len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    for name in ("auto", "formula"):
        layer = make(shape[1], chunks=chunks)
        with norm_backend(name):
            y = layer(leaf := x.clone().requires_grad_())
            slopes = torch.autograd.grad(y, [leaf, *layer.parameters()], grad)
        found.append([y, *slopes, layer.running_mean, layer.running_var])
        assert ("Function" in y.grad_fn.name()) == (name == "formula")
    rounding = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(*found, rtol=rounding, atol=rounding)


def test_stages_take_a_rank_without_elements() -> None:
    kernels, x, mean = CpuBatchNorm(), torch.empty(0, 3, 4, 4), torch.ones(3)
    assert kernels.sums(x).tolist() == kernels.sums_of_sizes(x, mean).tolist() == [0, 0, 0]
    positions, deviations = kernels.largest(x, mean, 2)
    assert not positions.any()
    assert not deviations.any()
    assert kernels.affine(x, x, mean, mean, mean, "add_relu").shape == x.shape
    assert not kernels.gradient_sums(x, x, x, mean, PowerMean(1.0)).any()
    assert kernels.gradient(x, x, x, mean, mean, mean, mean)[0].shape == x.shape


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("shape", [(24, 5), (7, 33), (200, 300), (3, 5000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("learned", [True, False])
def test_layer_norm_kernels_equal_the_definition(
    shape: tuple[int, ...], dtype: torch.dtype, centred: bool, learned: bool
) -> None:
    kernel_contract.check_rows(shape, dtype, centred, learned, torch.ops.nmlightning.layer_norm)


def test_track_moves_running_statistics() -> None:
    kernel_contract.check_tracking(torch.ops.nmlightning.track)


# ---- what is kept ----


# The tolerance · √3 over half of the last place of 1.
X_FREE_REACH = {torch.float32: 14.5, torch.bfloat16: 1.77}


def kept_x(fused: Fused | None, weight: float, bias: float, dtype: torch.dtype, k: int = 0) -> bool:
    (x, residual, *_), _ = kernel_contract.draw(
        kernel_contract.Case((4, 3, 5, 5), fused="add_relu", dtype=dtype), "cpu"
    )
    learned = torch.tensor([1.0, weight, 1.0]), torch.tensor([0.0, bias, 0.0])
    inputs = (x, residual if fused == "add_relu" else None, *learned)
    statistic = LargestMean(k) if k else PowerMean(1.0)
    return kernel_contract.run(CpuBatchNorm(), statistic, inputs, fused=fused).keeps(x)


@pytest.mark.parametrize("dtype", X_FREE_REACH)
@pytest.mark.parametrize("k", [0, 2])
def test_relu_saves_x_only_where_the_output_is_too_coarse(dtype: torch.dtype, k: int) -> None:
    reach = X_FREE_REACH[dtype]
    for weight in (1.0, -0.5, 1e-20):
        assert not kept_x("relu", weight, 0.99 * reach * abs(weight), dtype, k)
        assert not kept_x("relu", weight, -99 * reach * abs(weight), dtype, k)
        assert kept_x("relu", weight, 1.01 * reach * abs(weight), dtype, k)
    for weight in (0.0, 1e-31, math.nan, math.inf):
        assert kept_x("relu", weight, 0.0, dtype, k)
    assert kept_x(None, 1.0, 0.0, dtype, k)


def test_add_relu_saves_x_only_where_the_sum_is_large() -> None:
    assert not kept_x("add_relu", 1.0, 0.0, torch.float32)
    assert kept_x("add_relu", 0.01, 0.0, torch.float32)
    assert kept_x("add_relu", 1.0, 20.0, torch.float32)
    assert kept_x("add_relu", 1.0, 0.0, torch.bfloat16)


@pytest.mark.parametrize("dtype", X_FREE_REACH)
def test_x_free_reach_keeps_the_tolerance(dtype: torch.dtype) -> None:
    """The error of Σ g · x̂, whose terms have random signs, against that of one of its size."""
    half_last_place = torch.finfo(dtype).eps / 2
    tolerance = {torch.float32: 5e-7, torch.bfloat16: 4e-3}[dtype]
    assert X_FREE_REACH[dtype] == pytest.approx(tolerance * 3**0.5 / half_last_place, rel=0.02)
    case = kernel_contract.Case((64, 2, 16, 16), fused="relu", dtype=dtype)
    (x, *_), grad = kernel_contract.draw(case, "cpu")
    weight = torch.ones(2)
    bias = weight * X_FREE_REACH[dtype] * 0.99
    step = kernel_contract.run(
        CpuBatchNorm(), PowerMean(1.0), (x, None, weight, bias), grad, "relu", CONSTANT
    )
    assert not step.keeps(x)
    leaf = x.double()
    d = leaf - leaf.mean((0, 2, 3), keepdim=True)
    normal = d / ((d.abs().mean((0, 2, 3), keepdim=True) * CONSTANT) ** 2 + EPS).sqrt()
    passed = grad.double() * (normal + bias.double().view(1, 2, 1, 1) > 0)
    expected = (passed * normal).sum((0, 2, 3))
    size = (passed * normal).square().sum((0, 2, 3)).sqrt()
    found = step.gradients[2]
    assert ((found - expected).abs() <= 4 * tolerance * size).all()


# ---- the layers ----


@pytest.mark.parametrize("make", [norms.L1LayerNorm, norms.L1RMSNorm])
def test_layers_work_under_no_grad_and_as_the_formula(make: Any) -> None:
    x = torch.randn(4, 8, 6, 6, requires_grad=True)
    layer = make([8, 6, 6])
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    y = layer(x)
    assert "Norm" in y.grad_fn.name()
    assert "FunctionBackward" not in y.grad_fn.name()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y, rtol=0, atol=0)
    found, of = [], [x, *layer.parameters()]
    for name in ("auto", "formula"):
        with norm_backend(name):
            y = layer(x)
            slopes = torch.autograd.grad(y.square().sum(), of, create_graph=True)
            found.append([y, *slopes, *torch.autograd.grad(slopes[0].square().sum(), x)])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [norms.L1LayerNorm, norms.L1RMSNorm])
@pytest.mark.parametrize("shape", [(3000, 90), (130, 900)])
def test_rows_have_the_same_bits_on_one_thread_and_two(make: Any, shape: tuple[int, int]) -> None:
    x, grad, found = torch.randn(shape), torch.randn(shape), []
    for threads, strided in ((1, x.t().contiguous().t()), (2, x)):
        torch.set_num_threads(threads)
        y = (layer := make(shape[1]))(leaf := strided.requires_grad_())
        found.append([y, *torch.autograd.grad(y, [leaf, *layer.parameters()], grad)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("make", [norms.L1LayerNorm, norms.L1RMSNorm])
@pytest.mark.parametrize("n", [3, 5, 6, 7, 11, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_gradients_have_the_definitions_sign_at_the_mean(
    make: Any, n: int, dtype: torch.dtype
) -> None:
    layer, x = make(n), torch.randint(-3, 4, (500, n)).to(dtype)
    grad = torch.randn(500, n).to(dtype)
    x[:, 0] = 4  # so that no row is constant
    assert (x.double().sum(1) % n == 0).any()  # their means may be elements
    given, exact = x.requires_grad_(), x.detach().double().requires_grad_()
    found = torch.autograd.grad(layer(given), given, grad)[0].double()
    expected = torch.autograd.grad(layer.double()(exact), exact, grad.double())[0]
    rounding = 8 * torch.finfo(dtype).eps  # a sign that differs moves a gradient by about 1 / n
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("negative", ["x", "weight", "bias", "grad"])
@pytest.mark.parametrize("norm", ["L1LayerNorm", "L1RMSNorm", "L1BatchNorm1d", "LInfBatchNorm1d"])
def test_layers_read_negative_views_by_their_values(norm: str, negative: str) -> None:
    layer, shape, found = getattr(norms, norm)(16), {"x": (9, 16), "grad": (9, 16)}, []
    values = {name: torch.randn(shape.get(name, (16,))) for name in ("x", "weight", "bias", "grad")}
    for view in (torch.neg, torch._neg_view):
        given = {**values, negative: view(values[negative])}
        grad = given.pop("grad")
        leaves = {name: q.detach().requires_grad_() for name, q in given.items()}
        learned = {name: leaves[name] for name, _ in layer.named_parameters()}
        y = functional_call(layer, learned, leaves["x"])
        found.append([y, *torch.autograd.grad(y, [leaves["x"], *learned.values()], grad)])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("negative", range(3))
def test_weight_norm_reads_negative_views_by_their_values(negative: int) -> None:
    values, found = [torch.randn(4, 6), torch.randn(4), torch.randn(4, 6)], []
    for view in (torch.neg, torch._neg_view):
        v, s, grad = (view(q) if i == negative else q for i, q in enumerate(values))
        leaves = [v.detach().requires_grad_(), s.detach().requires_grad_()]
        w = normalise_weight(*leaves, 2.0)
        found.append([w, *torch.autograd.grad(w, leaves, grad)])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_more_values_than_a_float_counts_may_be_the_largest() -> None:
    """All of them are those of L1; 2^24 + 1 is no float, and the last value would be left out."""
    n, found = 2**24 + 1, []
    x = (1 - 2 * (torch.arange(n) % 2)).float()[:, None].requires_grad_()
    for k in (0, n):
        y = torch.ops.nmlightning.batch_norm(k, x, *[None] * 6, 1.0, EPS, 0.1, None)[0]
        found.append(torch.autograd.grad(y, x, x.detach())[0])
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_layers_take_half_parameters_and_strided_gradients() -> None:
    layer = norms.L1BatchNorm2d(4).to(torch.bfloat16)
    x = torch.randn(3, 4, 5, 5, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad.dtype == torch.bfloat16
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    y = layer(last)
    assert y.is_contiguous(memory_format=torch.channels_last)
    grad = torch.randn(3, 4, 5, 5, dtype=torch.bfloat16)
    one = torch.autograd.grad(layer(x), x, grad)[0]
    torch.testing.assert_close(torch.autograd.grad(y, last, grad)[0], one, rtol=0.02, atol=0.02)


def test_traced_code_takes_the_formula() -> None:
    layer = norms.L1BatchNorm2d(4)
    x = torch.randn(3, 4, 5, 5)
    with pytest.warns(UserWarning, match="exported in training mode"):
        program = torch.export.export(layer, (x,))
    assert "nmlightning" not in str(program.graph)


@pytest.mark.parametrize(
    ("change", "reason"),
    {
        "p": ({"statistic": PowerMean(2.0)}, "no kernel for p = 2"),
        "range": ({"kind": "layer", "statistic": RangeMean(2)}, "no kernel for the range"),
        "unknown": ({"statistic": MadeUpMean()}, "no kernel for the made-up mean"),
        "largest in rows": (
            {"kind": "layer", "statistic": LargestMean(1)},
            "no kernel for the largest value",
        ),
        "dtype": ({"dtype": torch.float64}, "no kernel for float64"),
        "stats": ({"stats_dtype": torch.float16}, "no kernel for statistics in float16"),
        "layout": ({"layout": "other"}, "no kernel for elements in this order"),
    }.values(),
)
def test_select_backend_gives_the_reason_for_the_formula(
    change: dict[str, Any], reason: str
) -> None:
    supported = DispatchKey("batch", PowerMean(1.0), "cpu", torch.float32, torch.float32, "NCHW")
    assert select_backend(supported).backend == "C++"
    assert select_backend(supported._replace(**change)) == ("formula", reason, None)


def test_library_uses_torchs_threads() -> None:
    """No second OpenMP is loaded, whose threads torch.set_num_threads would not know of."""
    with open("/proc/self/maps") as maps:
        found = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line}
    torch_folder = torch.__path__[0].rsplit("/", 1)[0]
    assert not [path for path in found if not path.startswith(torch_folder)]


def test_residual_on_another_device_is_an_error() -> None:
    layer, x = norms.L1BatchNorm2d(4), torch.randn(3, 4, 5, 5)
    layer.fused = "add_relu"
    with pytest.raises(RuntimeError, match="device"):
        layer(x, x.to("meta"))
    with pytest.raises(RuntimeError, match="expected a residual like x"):
        torch.ops.nmlightning.affine(x, x[:2], *torch.ones(3, 4), 2)


@pytest.mark.parametrize("p", [1, 2])
def test_fake_tensors_take_the_formula(p: int) -> None:
    layer, norm = norms.LpBatchNorm2d(4, p=p), nn.LayerNorm(5)
    swap_norms(norm_net := nn.Sequential(norm), "l1", kinds=["layer"])
    x = torch.randn(3, 4, 5, 5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert type(layer(x)) is FakeTensor
        assert norm_net(x).shape == x.shape
    torch.testing.assert_close(make_fx(norm_net)(x)(x.flip(0)), norm_net(x.flip(0)))
    assert torch.equal(layer.running_mean, torch.zeros(4))
