"""Every norm under `torch.func` and with gradients that are many, eager and compiled."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from batch_norm_contract import DISTINCT, NORMS
from nmlightning import norms

pytestmark = [
    # Forward mode scripts torch's own decompositions.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    # Dynamo of torch 2.11 instantiates any autograd function that it traces.
    pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning"),
]
LAYERS = {
    "layer l1": lambda: norms.L1LayerNorm(6),
    "layer lp2": lambda: norms.LpLayerNorm(6, p=2),
    "rms lp3": lambda: norms.LpRMSNorm(6, p=3),
}
every_kind = pytest.mark.parametrize("name", [*DISTINCT, "mean", *LAYERS])


def make(name: str, tracked: bool) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a norm in float64, whose parameters are not learned, and the shape of its input."""
    layer = LAYERS[name]() if name in LAYERS else NORMS[name].layer(track_running_stats=tracked)
    return layer.double().requires_grad_(False), (3, 6) if name in LAYERS else (5, 3, 2, 2)


def transformed(layer: nn.Module, xs: Tensor, tangent: Tensor) -> list[Tensor]:
    """Return outputs and gradients of each x, a Jacobian and a directional derivative."""
    by_each = vmap(grad(lambda x: layer(x).pow(3).sum()))
    found = [vmap(layer)(xs), vmap(layer, 1, 1)(xs.transpose(0, 1)), by_each(xs)]
    found.append(jacrev(layer)(xs[0]))
    if not torch.compiler.is_compiling():  # there torch 2.15's own fail, too
        found.append(jvp(layer, (xs[0],), (tangent,))[1])
    return found


def one_by_one(layer: nn.Module, xs: Tensor, tangent: Tensor) -> list[Tensor]:
    """Return the same by autograd, an x and a value at a time."""
    y, leaf = torch.stack([layer(x) for x in xs]), xs.clone().requires_grad_()
    (by_each,) = torch.autograd.grad(sum(layer(x).pow(3).sum() for x in leaf), leaf)
    jacobian = torch.autograd.functional.jacobian(layer, xs[0])
    along = torch.tensordot(jacobian, tangent, tangent.dim())
    return [y, y.transpose(0, 1), by_each, jacobian, along]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("training", [False, True])
@every_kind
def test_transforms_are_those_one_by_one(name: str, training: bool, compiled: bool) -> None:
    layer, shape = make(name, tracked=not training)
    layer.train(training)
    xs, tangent = torch.randn(2, *shape).double(), torch.randn(shape).double()
    torch._dynamo.reset()
    compute = torch.compile(transformed, backend="aot_eager") if compiled else transformed
    found = compute(layer, xs, tangent)
    torch.testing.assert_close(found, one_by_one(layer, xs, tangent)[: len(found)])


@pytest.mark.parametrize("mode", ["real", "symbolic"])
@every_kind
def test_traced_operations_hold_for_other_values(name: str, mode: str) -> None:
    layer, shape = make(name, tracked=False)
    layer.float()
    first, x = (torch.randn(shape).mul(scale).requires_grad_() for scale in (1, 3))

    def differentiate(x: Tensor) -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y.sin().sum(), x)]

    traced = make_fx(differentiate, tracing_mode=mode, _allow_non_fake_inputs=True)(first)
    torch.testing.assert_close(traced(x), differentiate(x))


def test_mean_in_pure_half_is_transformed_as_in_float32() -> None:
    layer, x = norms.MeanOnlyBatchNorm2d(3, track_running_stats=False), torch.randn(5, 3, 2, 2)
    half = norms.MeanOnlyBatchNorm2d(3, track_running_stats=False, stats_dtype="bfloat16")
    torch.testing.assert_close(transformed(half, x[None], x), transformed(layer, x[None], x))


@every_kind
def test_gradients_may_be_many(name: str) -> None:
    layer, shape = make(name, tracked=True)
    x, grads = torch.randn(shape).double().requires_grad_(), torch.randn(3, *shape).double()
    y, jacobian = layer(x), torch.autograd.functional.jacobian
    (found,) = torch.autograd.grad(y, x, grads, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in grads]
    torch.testing.assert_close(found, torch.stack(each))
    for strategy in ("reverse-mode", "forward-mode"):
        found = jacobian(layer.eval(), x, vectorize=True, strategy=strategy)
        torch.testing.assert_close(found, jacobian(layer, x))
