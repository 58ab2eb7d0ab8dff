"""Low precision: which norm is right at which σ in pure half, and quantisation noise.

The rows are those of the table in docs/half_precision.md. An eps of 1e-10, so that small σ test
half's range and not eps.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nmlightning import norms
from nmlightning.errors import InputError
from nmlightning.norms import QuantizationNoise

CHANNELS = 32
EPS = 1e-10
SIGMAS = [1e-4, 1e-3, 2e-2, 0.1, 1.0, 10.0, 50.0, 60.0, 80.0, 1e3, 1e4]
HALF = {"stats_dtype": torch.float16}
LAYERS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "op-by-op L2": (norms.HalfL2BatchNorm2d, {}),
    "compact L2": (norms.LpBatchNorm2d, {"p": 2, **HALF}),
    "L1": (norms.L1BatchNorm2d, HALF),
    "L∞": (norms.LInfBatchNorm2d, HALF),
    "Top(10)": (norms.TopKBatchNorm2d, HALF),
    "L1.5": (norms.LpBatchNorm2d, {"p": 1.5, **HALF}),
    "range": (norms.RangeBatchNorm2d, HALF),
    "L1, bfloat16": (norms.L1BatchNorm2d, {"stats_dtype": torch.bfloat16}),
    "compact L2, bfloat16": (norms.LpBatchNorm2d, {"p": 2, "stats_dtype": torch.bfloat16}),
    "L1, float32": (norms.L1BatchNorm2d, {}),
    "L2, float32": (norms.LpBatchNorm2d, {"p": 2}),
}
ALL = set(SIGMAS)
# Where forward and backward are right in all channels; L2's are what the paper's figure is about.
RIGHT_FORWARD = dict.fromkeys(LAYERS, ALL)
RIGHT_BACKWARD = dict(RIGHT_FORWARD)
# At 1e-4 the gradient at the maxima, of 4096 unit gradients, is itself beyond 65504.
RIGHT_BACKWARD["L∞"] = RIGHT_BACKWARD["Top(10)"] = ALL - {1e-4}
RIGHT_FORWARD["op-by-op L2"] = {2e-2, 0.1, 1.0, 10.0, 50.0}
RIGHT_BACKWARD["op-by-op L2"] = {0.1, 1.0, 10.0, 50.0}
RIGHT_FORWARD["compact L2"] = RIGHT_BACKWARD["compact L2"] = RIGHT_FORWARD["op-by-op L2"]


def batch(sigma: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = sigma * torch.randn(16, CHANNELS, 16, 16, generator=generator)
    return x.half(), torch.randn(x.shape, generator=generator)


def train(name: str, x: Tensor, grad: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    cls, options = LAYERS[name]
    leaf = x.clone().requires_grad_()
    y = cls(CHANNELS, **{**options, "eps": EPS, **settings})(leaf)
    y.backward(grad.to(y.dtype))
    return y.detach().double(), leaf.grad.double()


def share_right(found: Tensor, expected: Tensor, tolerance: float) -> float:
    """Return the share of channels whose root mean squared error is below it, relatively."""
    error = (found - expected).square().mean((0, 2, 3)).sqrt()
    return (error <= tolerance * expected.square().mean((0, 2, 3)).sqrt()).double().mean().item()


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("name", LAYERS)
def test_norm_is_right_at_its_scales_only(name: str, sigma: float) -> None:
    x, grad = batch(sigma)
    reference = "compact L2" if "L2" in name else name
    expected = train(reference, x.double(), grad, stats_dtype=torch.float64)
    found = train(name, x, grad)
    # 1 % is about ten roundings of half. bfloat16 has an eighth of its precision; and a tie that
    # rounding makes may choose another of a range's extremes.
    tolerance = 0.05 if "bfloat16" in name or name == "range" else 0.01
    right = [share_right(f, e, tolerance) for f, e in zip(found, expected, strict=True)]
    for share, where in zip(right, (RIGHT_FORWARD[name], RIGHT_BACKWARD[name]), strict=True):
        assert share == 1.0 if sigma in where else share < 1.0


def test_op_by_op_l2_loses_gradients_or_channels() -> None:
    """Small σ give no finite gradient; from 60 on channels die, and at 80 all have, with no NaN."""
    y, grad = train("op-by-op L2", *batch(2e-2))
    assert y.isfinite().all()
    assert not grad.isfinite().any()
    y, grad = train("op-by-op L2", *batch(60.0))
    dead = (y == 0).all(3).all(2).all(0)
    assert 0 < dead.sum() < CHANNELS
    y, grad = train("op-by-op L2", *batch(80.0))
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.equal(grad, torch.zeros_like(grad))


def test_compact_l2_has_finite_gradients_at_small_scales() -> None:
    for sigma in (1e-3, 2e-2):
        _, grad = train("compact L2", *batch(sigma))
        assert grad.isfinite().all()


@pytest.mark.parametrize("eps", [1e-5, 1e-10])
def test_small_sigma_is_damped_by_eps(eps: float) -> None:
    """At σ = 1e-3 every norm gives 0.30 with torch's eps, in float64 too."""
    x, grad = batch(1e-3)
    expected = 1e-3 / math.sqrt(1e-6 + eps)
    for name in ("L1", "L1, float32", "L2, float32"):
        y, _ = train(name, x, grad, eps=eps)
        assert y.std().item() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", [n for n in LAYERS if "float" not in n])
def test_pure_half_rounds_alike_for_every_input_dtype(name: str) -> None:
    x, grad = batch(1.0)
    narrow = train(name, x, grad)
    wide = train(name, x.float(), grad.half().float())
    assert torch.equal(narrow[0], wide[0])
    assert torch.equal(wide[0], wide[0].half().double())
    assert torch.equal(narrow[1], wide[1])


@pytest.mark.parametrize("name", ["L1", "compact L2", "op-by-op L2"])
def test_pure_half_is_unchanged_by_autocast(name: str) -> None:
    x, grad = batch(1.0)
    plain = train(name, x, grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, train(name, x, grad), plain))


@pytest.mark.slow
# Dynamo of torch 2.15 looks at every tensor's grad where a graph breaks.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_pure_half_is_unchanged_by_compilation() -> None:
    torch._dynamo.reset()
    x = batch(80.0)[0]
    layers = [cls(CHANNELS, **options) for cls, options in (LAYERS["L1"], LAYERS["op-by-op L2"])]
    layers += [norms.MeanOnlyBatchNorm2d(CHANNELS, **HALF), norms.LpLayerNorm(16, p=2, **HALF)]
    layers.append(norms.L1RMSNorm(16, **HALF))
    for layer in layers:
        net = nn.Sequential(nn.ReLU(), layer, nn.ReLU())
        compiled = torch.compile(net)
        assert torch.equal(compiled(x), net(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("n", [48, 100, 3136, 5000])
@pytest.mark.parametrize("name", [n for n in LAYERS if "float32" not in n])
def test_constant_channel_is_zero_at_any_length(name: str, n: int) -> None:
    """Its mean is the very value, though n is no power of two."""
    cls, options = LAYERS[name]
    x = (200 * torch.rand(CHANNELS)).half().expand(1, n, CHANNELS).mT.unsqueeze(3)
    y = cls(CHANNELS, **options)(x)
    if name != "op-by-op L2":  # whose own mean rounds
        assert torch.equal(y, torch.zeros_like(y))
    mean_only = norms.MeanOnlyBatchNorm2d(CHANNELS, stats_dtype=torch.float16)
    assert torch.equal(mean_only(x), torch.zeros_like(y))


def test_layer_norm_takes_an_empty_batch_in_half() -> None:
    for cls in (norms.L1LayerNorm, norms.L1RMSNorm):
        assert cls(9, **HALF)(torch.randn(0, 9)).shape == (0, 9)


def test_half_l2_ignores_sync_in_one_process() -> None:
    layer = norms.HalfL2BatchNorm2d(3, sync=True)
    assert layer(torch.randn(2, 3, 4, 4)).isfinite().all()  # one process has nobody to share with


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_noise_is_proportional_to_the_standard_deviation(dtype: torch.dtype, scale: float) -> None:
    x = (scale * (torch.randn(64, 8, 16, 16) + 5)).to(dtype)
    y = QuantizationNoise(0.3).eval()(x)
    noise = y.double() - x.double()
    assert y.dtype == dtype
    # 131,072 values: σ to 0.2 %; bfloat16 rounds values of 5 σ to 1 % of σ.
    assert noise.std() == pytest.approx(0.3 * scale, rel=0.01)
    assert noise.mean().abs() < 0.01 * scale
    correlation = torch.corrcoef(torch.stack([noise.flatten(), x.double().flatten()]))[0, 1]
    assert correlation.abs() < 0.02  # a factor instead of a summand would correlate |noise| with x
    sizes = torch.corrcoef(torch.stack([noise.abs().flatten(), x.double().flatten()]))[0, 1]
    assert sizes.abs() < 0.02


def test_noise_passes_gradients_unchanged() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    grad = torch.randn(4, 3)
    QuantizationNoise(0.5)(x).backward(grad)
    assert torch.equal(x.grad, grad)


def test_noise_is_fresh_each_time_and_absent_at_zero() -> None:
    x = torch.randn(4, 3)
    noise = QuantizationNoise(0.5)
    assert QuantizationNoise(0)(x) is x
    assert not torch.equal(noise(x), noise(x))
    assert torch.equal(noise(torch.ones(4)), torch.ones(4))
    assert noise(torch.ones(1)).item() == 1
    assert repr(noise) == "QuantizationNoise(0.5)"


@pytest.mark.parametrize("ratio", [-0.1, math.nan, math.inf, "0.1", None, True])
def test_noise_rejects_bad_ratios(ratio: object) -> None:
    with pytest.raises(InputError, match=f"ratio must be finite and at least 0, got {ratio!r}"):
        QuantizationNoise(ratio)
