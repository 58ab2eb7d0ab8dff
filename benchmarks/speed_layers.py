"""C2 to C5, N2 to N5 and N9: a norm layer on the CPU, forward and backward, against torch's own.

One run times torch's norm, ours, and the same by the formula alone; another batch norm and then
ReLU, and both as one operation.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Set
from functools import partial
from itertools import product
from typing import TypeVar

import torch
from interleaved import Call, Quartiles
from norm_layers import LAYOUTS, backend_of, layer_step
from sampled import Figure, sample_rounds
from speed_plan import TYPES, Plan, Shape
from targets import Bound, Measurement, Result
from torch import Tensor, nn

from nmlightning import norm_backend, swap_norms
from nmlightning.norms import (
    L1BatchNorm2d,
    L1LayerNorm,
    L1RMSNorm,
    LInfBatchNorm2d,
    TopKBatchNorm2d,
)

Net = TypeVar("Net", bound=nn.Module)
NORMS: dict[str, type[nn.Module]] = {
    "L1": L1BatchNorm2d,
    "L∞": LInfBatchNorm2d,
    "Top(10)": TopKBatchNorm2d,
}
# By type and layout: the target of each norm.
BATCH_NORMS: dict[tuple[str, str], dict[str, tuple[str, Bound | None]]] = {
    ("bf16", "NHWC"): {"L1": ("N3", Bound(0.6, each=0.9))},
    ("bf16", "NCHW"): {"L1": ("N3", Bound(0.7, each=0.9))},
    ("fp32", "NHWC"): {
        "L1": ("N4", Bound(0.8)),
        "L∞": ("N4", Bound(0.8)),
        "Top(10)": ("N4", Bound(0.9)),
    },
    ("fp32", "NCHW"): {
        "L1": ("N5", Bound(0.5)),
        "L∞": ("C4", Bound(0.75)),
        "Top(10)": ("C4", Bound(0.85)),
    },
}
BY_FORMULA = {"L1": Bound(3), "L∞": Bound(1.6), "Top(10)": Bound(2.5)}
SMALL = (Bound(0.9), Bound(0.7))
TOKEN_NORMS = {
    "L1 layer norm": (L1LayerNorm, Bound(0.9, each=0.9)),
    "L1 RMS norm": (L1RMSNorm, Bound(0.8, each=0.8)),
}


def measure_norms(plan: Plan, targets: Set[str]) -> Iterator[Result]:
    """Yield C4, C5 and N3 to N5."""
    for shape, ((dtype, layout), norms) in product(plan.shapes, BATCH_NORMS.items()):
        wanted = {
            name: norms.get(name, (norms["L1"][0], None))
            for name in NORMS
            if norms.get(name, norms["L1"])[0] in targets
        }
        formulas = NORMS if dtype == "fp32" and "C5" in targets else ()
        if wanted or formulas:
            x, grad = draw_input(shape, layout, dtype)
            layers = {name: NORMS[name](shape[1]) for name in NORMS}
            steps = {name: layer_step(layers[name], x, grad) for name in wanted}
            for name in formulas:
                steps[f"{name}, formula"] = _by_formula(layer_step(layers[name], x, grad))
            steps[""] = layer_step(nn.BatchNorm2d(shape[1]), x, grad)
            rounds = sample_rounds(steps, plan.layer_pace)
            rows = [(t, n, n, backend_of(layers[n], x), b) for n, (t, b) in wanted.items()]
            rows += [("C5", n, f"{n}, formula", "formula", BY_FORMULA[n]) for n in formulas]
            for target, name, call, backend, bound in rows:
                what = f"{name} BN / BN, {dtype} {layout}"
                figure = rounds.figure(call, to="")
                yield Measurement(target, what, str(shape), backend, figure, bound)


def _by_formula(step: Call) -> Call:
    def run() -> None:
        with norm_backend("formula"):
            step()

    return run


def measure_small(plan: Plan, targets: Set[str]) -> Iterator[Result]:
    """Yield N2: the price of a call."""
    for shape, bound in zip(plan.small_shapes, SMALL, strict=False):
        for dtype, layout in product(TYPES, LAYOUTS):
            x, grad = draw_input(shape, layout, dtype)
            own = L1BatchNorm2d(shape[1])
            figure = _compare(plan, {"": nn.BatchNorm2d(shape[1]), "own": own}, x, grad)["own"]
            what = f"L1 BN / BN at {shape}"
            yield Measurement("N2", what, f"{dtype} {layout}", backend_of(own, x), figure, bound)


def measure_tokens(plan: Plan, targets: Set[str]) -> Iterator[Result]:
    """Yield N9: norms over the features of a token."""
    for width, dtype in product(plan.widths, TYPES):
        x = torch.randn(plan.elements // width, width).to(TYPES[dtype]).requires_grad_()
        layers = {name: make(width) for name, (make, _) in TOKEN_NORMS.items()}
        nets = {"": nn.LayerNorm(width), **layers}
        figures = _compare(plan, nets, x, torch.randn_like(x))
        for name, (_, bound) in TOKEN_NORMS.items():
            what = f"{name} / nn.LayerNorm, {dtype}, rows"
            case = f"of {width}"
            backend = backend_of(layers[name], x)
            yield Measurement("N9", what, case, backend, figures[name], bound)


def _compare(
    plan: Plan, nets: Mapping[str, nn.Module], x: Tensor, grad: Tensor
) -> dict[str, Figure]:
    """Return the figures of all nets against the one without a name."""
    steps = {name: layer_step(net, x, grad) for name, net in nets.items()}
    rounds = sample_rounds(steps, plan.layer_pace)
    return {name: rounds.figure(name, to="") for name in nets if name}


def measure_fused(plan: Plan, targets: Set[str]) -> Iterator[Result]:
    """Yield C2 and C3."""
    for shape, layout in product(plan.shapes, LAYOUTS):
        x, grad = draw_input(shape, layout, "fp32")
        plain = nn.Sequential(nn.BatchNorm2d(shape[1]), nn.ReLU())
        fused = swapped(plain, "relu")
        row = partial(Measurement, case=str(shape), backend=backend_of(fused[0], x))
        if "C2" in targets:
            ratio = _compare(plan, {"": plain, "fused": fused}, x, grad)["fused"]
            what = f"L1 BN+ReLU fused / BN, ReLU, {layout}"
            yield row("C2", what, quartiles=ratio, bound=Bound(0.6))
        if "C3" in targets:
            own, other = (count_saved_bytes(net, partial(net, x)) for net in (fused, plain))
            what = f"saved bytes of L1 BN+ReLU fused / BN, ReLU, {layout}"
            yield row("C3", what, quartiles=exactly(own / other), bound=Bound(0.55))


def count_saved_bytes(net: nn.Module, forward: Callable[[], object]) -> int:
    """Return the bytes of the distinct storages that `forward` saves, without net's parameters.

    A tensor that an autograd function keeps by another way than `save_for_backward` is not seen.
    """
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # the graph holds what it saved, so no address is used twice
    for parameter in net.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    del kept
    return sum(storages.values())


def swapped(net: Net, how: str | None) -> Net:
    """Return a copy whose batch norms are L1, and fused with what follows."""
    copied = copy.deepcopy(net)
    swap_norms(copied, "l1", fuse=how)
    return copied


def draw_input(
    shape: Shape, layout: str, type_name: str, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return an input that wants a gradient, and the gradient of the output."""
    dtype, memory_format = TYPES[type_name], LAYOUTS[layout]
    x = (
        (torch.randn(shape, device=device) * 1.5 + 0.3)
        .to(dtype)
        .contiguous(memory_format=memory_format)
    )
    return x.requires_grad_(), torch.randn_like(x)


def list_backends(plan: Plan) -> Iterator[str]:
    """Yield what serves the norms on the CPU, for each type and layout."""
    for type_name, layout in product(TYPES, LAYOUTS):
        x, _ = draw_input(plan.shapes[0], layout, type_name)
        backends = (f"{name} {backend_of(norm(x.shape[1]), x)}" for name, norm in NORMS.items())
        yield f"{type_name} {layout}: {', '.join(backends)}"


def exactly(value: float) -> Quartiles:
    """Return what is counted, not timed."""
    return Quartiles(value, value, value)
