"""Every norm under `torch.func` and with gradients that are many, eager and compiled."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, jvp, vmap

from nmlightning import norms

pytestmark = [
    # Forward mode scripts torch's own decompositions.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    # Dynamo of torch 2.11 instantiates any autograd function that it traces.
    pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning"),
]
CHANNELS, FEATURES = (5, 3, 2, 2), (3, 6)
NORMS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "l1": (norms.L1BatchNorm2d, CHANNELS),
    "linf": (norms.LInfBatchNorm2d, CHANNELS),
    "top10": (norms.TopKBatchNorm2d, CHANNELS),
    "lp3": (lambda c, **more: norms.LpBatchNorm2d(c, p=3, **more), CHANNELS),
    "range": (lambda c, **more: norms.RangeBatchNorm2d(c, chunks=4, **more), CHANNELS),
    "mean": (norms.MeanOnlyBatchNorm2d, CHANNELS),
    "layer l1": (norms.L1LayerNorm, FEATURES),
    "layer lp2": (lambda c, **more: norms.LpLayerNorm(c, p=2, **more), FEATURES),
    "rms lp3": (lambda c, **more: norms.LpRMSNorm(c, p=3, **more), FEATURES),
}


def transformed(layer: nn.Module, xs: Tensor, tangent: Tensor) -> list[Tensor]:
    """Return outputs and gradients of each x, a directional derivative, and a Jacobian."""
    by_each = vmap(grad(lambda x: layer(x).pow(3).sum()))
    found = [vmap(layer)(xs), vmap(layer, 1, 1)(xs.transpose(0, 1)), by_each(xs)]
    found.append(jacrev(layer)(xs[0]))
    if not torch.compiler.is_compiling():  # there torch 2.15's own fail, too
        found.append(jvp(layer, (xs[0],), (tangent,))[1])
    return found


def one_by_one(layer: nn.Module, xs: Tensor, tangent: Tensor) -> list[Tensor]:
    """Return the same by autograd, an x and a value at a time."""
    y = torch.stack([layer(x) for x in xs])
    leaf = xs.clone().requires_grad_()
    cubes = sum(layer(x).pow(3).sum() for x in leaf)
    jacobian = torch.autograd.functional.jacobian(layer, xs[0])
    along = torch.tensordot(jacobian, tangent, tangent.dim())
    return [y, y.transpose(0, 1), torch.autograd.grad(cubes, leaf)[0], jacobian, along]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_transforms_are_those_one_by_one(name: str, training: bool, compiled: bool) -> None:
    make, shape = NORMS[name]
    untracked = {"track_running_stats": False} if training and shape == CHANNELS else {}
    layer = make(shape[1], dtype=torch.float64, **untracked).train(training).requires_grad_(False)
    xs, tangent = torch.randn(2, *shape, dtype=torch.float64), torch.randn(shape).double()
    torch._dynamo.reset()
    compute = torch.compile(transformed, backend="aot_eager") if compiled else transformed
    found = compute(layer, xs, tangent)
    torch.testing.assert_close(found, one_by_one(layer, xs, tangent)[: len(found)])


@pytest.mark.parametrize("name", NORMS)
def test_gradients_may_be_many(name: str) -> None:
    make, shape = NORMS[name]
    layer = make(shape[1], dtype=torch.float64)
    x, grads = torch.randn(shape, dtype=torch.float64).requires_grad_(), torch.randn(3, *shape)
    y = layer(x)
    (found,) = torch.autograd.grad(y, x, grads.double(), retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(y, x, g.double(), retain_graph=True)[0] for g in grads]
    torch.testing.assert_close(found, torch.stack(each))
    for strategy in ("reverse-mode", "forward-mode"):
        jacobian = torch.autograd.functional.jacobian
        found = jacobian(layer.eval(), x, vectorize=True, strategy=strategy)
        torch.testing.assert_close(found, jacobian(layer, x))
