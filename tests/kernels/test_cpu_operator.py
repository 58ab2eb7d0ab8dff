"""The operator of a batch norm in C++, in all that is done with a layer.

Each row is done by kernels and by the formula, to rounding; batches are counted as torch's does.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from nmlightning import norms
from nmlightning.functional.statistics import LargestMean, PowerMean
from nmlightning.kernels import norm_backend

pytestmark = pytest.mark.usefixtures("_kernels")
LAYERS: dict[str, Any] = {
    "l1": lambda: norms.L1BatchNorm2d(8),
    "linf": lambda: norms.LInfBatchNorm2d(8),
    "top3": lambda: norms.TopKBatchNorm2d(8, k=3),
    "range": lambda: norms.RangeBatchNorm2d(8, chunks=7),
}
STATE = ("running_mean", "running_var", "num_batches_tracked")


def make(norm: str, fused: Any = None) -> Any:
    torch.manual_seed(1)
    layer = LAYERS[norm]()
    layer.fused = fused
    nn.init.uniform_(layer.weight, -1, 2)
    nn.init.normal_(layer.bias)
    return layer


def draw(dtype: torch.dtype = torch.float32) -> Tensor:
    return (2 * torch.randn(4, 8, 5, 6) + 1).to(dtype)


def step(layer: Any, x: Tensor) -> list[Tensor]:
    """Return the output, the gradients by all that is learned, and the statistics."""
    leaves = [q for q in (x, *layer.parameters()) if q.requires_grad]
    y = layer(x)
    loss = (y.float() * torch.linspace(-1, 2, y.numel()).view_as(y)).sum()
    found = torch.autograd.grad(loss, leaves) if leaves and y.requires_grad else ()
    return [
        y.detach(),
        *found,
        *(q.clone() for q in (getattr(layer, n) for n in STATE) if q is not None),
    ]


def twins(norm: str, fused: Any, use: Callable[[Any], list[Tensor]]) -> Any:
    """Do the same by kernels and by the formula, and compare."""
    layer = make(norm, fused)
    other = copy.deepcopy(layer)
    found = use(layer)
    with norm_backend("formula"):
        expected = use(other)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    return layer


# ---- settings, which may change between two calls ----


def _set(name: str, value: Any) -> Callable[[Any], Any]:
    return lambda layer: setattr(layer, name, copy.deepcopy(value))


def _freeze(*names: str) -> Callable[[Any], Any]:
    return lambda layer: [getattr(layer, name).requires_grad_(False) for name in names]


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda layer: None,
    "eps": _set("eps", 0.5),
    "momentum": _set("momentum", 0.7),
    "momentum none": _set("momentum", None),
    "statistic": _set("statistic", LargestMean(5)),
    "statistic without kernel": _set("statistic", PowerMean(3.0)),
    "constant": _set("constant", 2.5),
    "stats_dtype": _set("stats_dtype", torch.float64),
    "fused": _set("fused", "relu"),
    "no bias": _set("bias", None),
    "no weight": _set("weight", None),
    "untracked": _set("track_running_stats", False),
    "not counted": _set("num_batches_tracked", None),
    "no statistics": lambda layer: [setattr(layer, name, None) for name in STATE],
    "strided statistics": _set("running_mean", torch.zeros(8, 2)[:, 0]),
    "wide statistics": _set("running_var", torch.ones(8).double()),
    "half statistics": _set("running_var", torch.ones(8).half()),
    "counted as float": _set("num_batches_tracked", torch.zeros(())),
    "frozen": _freeze("weight", "bias"),
    "frozen weight": _freeze("weight"),
    "bfloat16": lambda layer: layer.to(torch.bfloat16),
    "bfloat16 weight": lambda layer: setattr(
        layer, "weight", nn.Parameter(layer.weight.detach().bfloat16())
    ),
    "eval and train": lambda layer: (layer.eval(), layer(draw()), layer.train()),
    "class": _set("__class__", norms.LInfBatchNorm2d),
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "parametrised": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Tanh()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("norm", LAYERS)
@pytest.mark.parametrize("by_x", [True, False], ids=["by x", "not by x"])
def test_changed_layer_normalises_as_the_formula(norm: str, change: str, by_x: bool) -> None:
    xs = [draw().requires_grad_(by_x) for _ in range(3)]

    def use(layer: Any) -> list[Tensor]:
        torch.manual_seed(2)
        layer(xs[0])
        CHANGES[change](layer)
        return [q for x in xs[1:] for q in step(layer, x)]

    layer = twins(norm, None, use)
    if change in ("pruned", "parametrised"):
        return  # which torch does not copy
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(step(again, xs[0]), step(copy.deepcopy(layer), xs[0]))


# ---- uses ----


def _checkpointed(reentrant: bool) -> Callable[[Any, Tensor], list[Tensor]]:
    def use(layer: Any, x: Tensor) -> list[Tensor]:
        y = checkpoint(layer, x, use_reentrant=reentrant)
        y.square().sum().backward()
        return [y, x.grad, layer.weight.grad]

    return use


def _hooked(hooks: Callable[[], Any]) -> Callable[[Any, Tensor], list[Tensor]]:
    def use(layer: Any, x: Tensor) -> list[Tensor]:
        with hooks():
            return step(layer, x)

    return use


def _twice(layer: Any, x: Tensor) -> list[Tensor]:
    y = layer(layer(x))
    y.register_hook(lambda g: g * 2)
    y.grad_fn.register_hook(
        lambda by_inputs, _: tuple(q if q is None else 3 * q for q in by_inputs)
    )
    first = torch.autograd.grad(y.sin().sum(), x, retain_graph=True)
    return [*first, *torch.autograd.grad(y.cos().sum(), [x, layer.weight])]


def _autocast(layer: Any, x: Tensor) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return step(layer, x)


def _without(context: Callable[[], Any]) -> Callable[[Any, Tensor], list[Tensor]]:
    def use(layer: Any, x: Tensor) -> list[Tensor]:
        with context():
            y = layer(x)
        assert not y.requires_grad
        return [y.clone(), layer.running_var]

    return use


def _many(layer: Any, x: Tensor) -> list[Tensor]:
    y = layer(x)
    grads = torch.linspace(-1, 1, 3 * y.numel()).view(3, *y.shape)
    return list(torch.autograd.grad(y, [x, layer.weight, layer.bias], grads, is_grads_batched=True))


def _created(layer: Any, x: Tensor) -> list[Tensor]:
    leaves = [x, layer.weight, layer.bias]
    firsts = torch.autograd.grad(layer(x).pow(3).sum(), leaves, create_graph=True)
    return [*firsts, *torch.autograd.grad(firsts[0].pow(2).sum() + firsts[1].sum(), leaves[:2])]


def _by_func(layer: Any, x: Tensor) -> list[Tensor]:
    parameters = dict(layer.named_parameters())
    layer.track_running_stats = False
    by_all = grad(lambda p, x: functional_call(layer, p, (x,)).pow(3).sum(), argnums=(0, 1))
    with torch.no_grad():
        mapped = vmap(layer)(torch.stack([x, 2 * x + 1]))
    by_parameters, by_x = by_all(parameters, x.detach())
    return [mapped, by_x, *by_parameters.values()]


def _tangent(layer: Any, x: Tensor) -> list[Tensor]:
    layer.track_running_stats = False
    with forward_ad.dual_level():
        y = layer(forward_ad.make_dual(x.detach(), x.detach().cos()))
        along = forward_ad.unpack_dual(y).tangent
    return [along, jvp(layer, (x.detach(),), (x.detach().cos(),))[1]]


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "nmlightning" not in str(func)
        return func(*args, **(kwargs or {}))


class _Subclass(Tensor):
    pass


def _as_subclass(layer: Any, x: Tensor) -> list[Tensor]:
    y = layer(x.as_subclass(_Subclass))
    return [y.as_subclass(Tensor), *torch.autograd.grad(y.as_subclass(Tensor).sin().sum(), x)]


USES: dict[str, Callable[[Any, Tensor], list[Tensor]]] = {
    "checkpoint": _checkpointed(False),
    "reentrant checkpoint": _checkpointed(True),
    "saved on the cpu": _hooked(save_on_cpu),
    "saved as copies": _hooked(lambda: saved_tensors_hooks(Tensor.clone, lambda q: q)),
    "twice": _twice,
    "autocast": _autocast,
    "no_grad": _without(torch.no_grad),
    "inference_mode": _without(torch.inference_mode),
    "many gradients": _many,
    "created graph": _created,
    "torch.func": _by_func,
    "forward mode": _tangent,
    "dispatch mode": _hooked(_Watch),
    "subclass": _as_subclass,
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("fused", [None, "relu"])
@pytest.mark.parametrize("norm", LAYERS)
def test_use_of_a_layer_gives_what_the_formula_gives(norm: str, fused: Any, use: str) -> None:
    x = draw()

    def on_leaf(layer: Any) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        if use == "created graph" and fused:
            if layer.backend_for(leaf).backend == "formula":
                return []
            with pytest.raises(RuntimeError, match=r"fused norm has it under norm_backend\('form"):
                USES[use](layer, leaf)
            return []
        return USES[use](layer, leaf)

    layer, torchs = twins(norm, fused, on_leaf), nn.BatchNorm2d(8)
    if use not in ("torch.func", "forward mode", "created graph", "subclass"):
        USES[use](torchs, x.clone().requires_grad_())
        assert layer.num_batches_tracked == torchs.num_batches_tracked


@pytest.mark.parametrize("changed", ["x", "weight", "y"])
def test_saved_tensor_changed_in_place_is_an_error(changed: str) -> None:
    layer, x = make("l1", "relu" if changed == "y" else None), draw().requires_grad_()
    given = x * 1
    y = layer(given)
    with torch.no_grad():
        {"x": given, "weight": layer.weight, "y": y}[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("change", ["broadcast", "double", "strided"])
@pytest.mark.parametrize("norm", LAYERS)
def test_residual_unlike_the_input_is_added_behind_the_kernel(norm: str, change: str) -> None:
    x = draw()
    residual = {"broadcast": x[0, :, :1, :1], "double": x.double(), "strided": x.mT.clone().mT}
    twins(norm, "add_relu", lambda layer: [layer(x, residual[change]), layer.running_var])
