"""Values far above those whose squares float32 holds are normalised like others."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from built_kernels import load_kernels
from nmlightning import norms
from nmlightning.kernels.dispatch import norm_backend

BATCH, LONG, TOKENS, LONG_TOKENS = (8, 8, 8, 8), (64, 3, 40, 40), (8, 64), (2, 6000)
NORMS: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, float]]] = {
    "batch l1": (norms.L1BatchNorm2d, LONG, {}),
    "batch linf": (norms.LInfBatchNorm2d, BATCH, {}),
    "batch topk": (norms.TopKBatchNorm2d, BATCH, {}),
    "batch range": (norms.RangeBatchNorm2d, BATCH, {}),
    "batch p2": (norms.LpBatchNorm2d, BATCH, {"p": 2.0}),
    "batch p3": (norms.LpBatchNorm2d, BATCH, {"p": 3.0}),
    "batch mean": (norms.MeanOnlyBatchNorm2d, LONG, {}),
    "layer l1": (norms.L1LayerNorm, LONG_TOKENS, {}),
    "layer p2": (norms.LpLayerNorm, TOKENS, {"p": 2.0}),
    "rms l1": (norms.L1RMSNorm, LONG_TOKENS, {}),
    "rms p2": (norms.LpRMSNorm, TOKENS, {"p": 2.0}),
    "layer scaled": (norms.ScaledLayerNorm, LONG_TOKENS, {}),
    "rms scaled": (norms.ScaledRMSNorm, LONG_TOKENS, {}),
}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # two last places of bfloat16
every_norm = pytest.mark.parametrize("name", NORMS)


def make(name: str, **settings: Any) -> nn.Module:
    cls, shape, options = NORMS[name]
    if "scaled" in name:
        settings.pop("stats_dtype", None)  # it computes in the input's
    return cls(shape[1], **options, **settings)


def batch(name: str, largest: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return an input of large sums, but for the first channel of a batch norm; a gradient."""
    shape = NORMS[name][1]
    x = torch.randn(shape) + 0.5
    x *= largest / x.abs().max()
    if name != "batch mean":
        x[:, : 1 if len(shape) == 4 else 0] /= largest
    return x.to(dtype).requires_grad_(), torch.randn(shape).to(dtype)


def sizes(x: Tensor) -> Tensor:
    """Return the largest |x| of each channel or token, by which gradients are small."""
    return x.detach().abs().amax((0, 2, 3) if x.dim() == 4 else (1,), True)


def train(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Return the output, gradients, of which that by x times |x|, and statistics, in float64."""
    y = layer(x)
    learned = [q for q in layer.parameters() if q.requires_grad]
    by_x, *others = torch.autograd.grad(y, [x, *learned], grad)
    found = {"y": y, "by x": by_x.double() * sizes(x).double()}
    found |= {f"by {i}": by for i, by in enumerate(others)} | dict(layer.named_buffers())
    return {key: value.detach().double() for key, value in found.items()}


def train_in_float64(name: str, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    return train(make(name).double(), x.detach().double().requires_grad_(), grad.double())


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("backend", ["auto", "formula"])
@pytest.mark.parametrize("largest", [3e18, 1e20, 1e37])
@every_norm
def test_training_equals_that_in_float64(
    name: str, largest: float, backend: Any, dtype: torch.dtype
) -> None:
    load_kernels()
    x, grad = batch(name, largest, dtype)
    with norm_backend(backend):
        found = train(make(name), x, grad)
    expected = train_in_float64(name, x, grad)
    # A running variance that float32 does not hold is left as it was, and the mean, too.
    lost = expected.get("running_var", torch.ones(1)) > torch.finfo(torch.float32).max
    for key, value in expected.items():
        if key.startswith("running"):
            value[lost] = float(key == "running_var")
        close = TOLERANCES[dtype] * value.abs().max().item()
        torch.testing.assert_close(found[key], value, rtol=0, atol=close)


@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float16, 6e4), (torch.bfloat16, 1e20), (torch.bfloat16, 1e37)]
)
@every_norm
def test_pure_half_trains_at_all_values_that_it_holds(
    name: str, dtype: torch.dtype, largest: float
) -> None:
    if dtype == torch.float16 and NORMS[name][2].get("p") == 2:
        pytest.skip("it is to show that float16 does not hold squares")
    x, grad = batch(name, largest, dtype)
    found, expected = train(make(name, stats_dtype=dtype), x, grad), train_in_float64(name, x, grad)
    for key in (key for key in found if "running" not in key):
        close = 16 * torch.finfo(dtype).eps * expected[key].abs().max().item()
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=close)


@every_norm
def test_transforms_and_second_derivatives_are_right(name: str) -> None:
    untracked = {"track_running_stats": False} if name.startswith("batch") else {}
    x, grad = batch(name, 1e20, torch.float32)
    layer, exact = make(name, **untracked), make(name, **untracked).double()
    wide = x.detach().double().requires_grad_()
    y = torch.vmap(layer)(x.detach()[None])[0]
    size = exact(wide).abs().max().item()
    torch.testing.assert_close(y.double(), exact(wide), rtol=1e-4, atol=1e-4 * size)
    by_x = torch.func.grad(lambda x: (layer(x) * grad).sum())(x.detach())
    (first,) = torch.autograd.grad(exact(wide), wide, grad.double())
    torch.testing.assert_close(
        by_x.double() * sizes(wide), first * sizes(wide), rtol=1e-3, atol=1e-3
    )
    (first,) = torch.autograd.grad(layer(x), x, grad, create_graph=True)
    if first.requires_grad:  # that of "mean" is constant
        assert torch.autograd.grad((first * sizes(x)).square().sum(), x)[0].isfinite().all()


@every_norm
def test_compiled_gradients_are_finite(name: str) -> None:
    torch._dynamo.reset()
    x, grad = batch(name, 1e20, torch.float32)
    found = train(torch.compile(make(name), backend="aot_eager"), x, grad)
    assert all(value.isfinite().all() for value in found.values())
