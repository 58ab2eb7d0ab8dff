"""C1 to C5: a norm layer on the CPU, forward and backward, against torch's own.

One run times `nn.BatchNorm2d`, our norms and the same by the formula alone; another batch norm and
then ReLU, and both as one operation.
"""

import copy
from collections.abc import Iterator, Set
from functools import partial
from itertools import product

import torch
from backends import backend_of, formula_alone
from interleaved import Call, Quartiles, quartiles_of_ratio, time_rounds
from norm_layers import LAYOUTS, layer_step
from saved_bytes import count_saved_bytes
from speed_plan import Plan, Shape
from targets import Bound, Measurement, Result
from torch import Tensor, nn

from nmlightning import swap_norms
from nmlightning.norms import L1BatchNorm2d, LInfBatchNorm2d, TopKBatchNorm2d

NORMS: dict[str, type[nn.Module]] = {
    "L1": L1BatchNorm2d,
    "L∞": LInfBatchNorm2d,
    "Top(10)": TopKBatchNorm2d,
}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# The bounds that hold for bf16, too, are C1's; the others were set for fp32.
BOUNDS = {
    ("C1", "L1", "fp32"): (Bound(0.75), "0.40 NCHW, 0.75 NHWC"),
    ("C1", "L1", "bf16"): (Bound(0.85), "0.40 NCHW, 0.75 NHWC"),
    ("C4", "L∞", "fp32"): (Bound(0.75), "0.35 to 0.6"),
    ("C4", "Top(10)", "fp32"): (Bound(0.85), "0.35 to 0.6"),
    ("C5", "L1", "fp32"): (Bound(3), ""),
    ("C5", "L∞", "fp32"): (Bound(1.6), ""),
    ("C5", "Top(10)", "fp32"): (Bound(2.5), ""),
}


def measure_norms(plan: Plan, targets: Set[str]) -> Iterator[Result]:
    """Yield C1, C4 and C5."""
    wanted = {key: bound for key, bound in BOUNDS.items() if key[0] in targets}
    for shape, layout, type_name in product(plan.shapes, LAYOUTS, TYPES):
        keys = [(target, norm) for target, norm, dtype in wanted if dtype == type_name]
        if keys:
            x, grad = draw_input(shape, layout, type_name)
            steps = {"": layer_step(nn.BatchNorm2d(shape[1]), x, grad)}
            layers = {key: NORMS[key[1]](shape[1]) for key in keys}
            for key, layer in layers.items():
                steps[" ".join(key)] = _step_of(key[0], layer, x, grad)
            times = time_rounds(steps, plan.rounds)
            for target, norm in keys:
                bound, limit = wanted[target, norm, type_name]
                yield Measurement(
                    target,
                    f"{norm} BN / BN, {type_name} {layout}" + ", no kernels" * (target == "C5"),
                    str(shape),
                    "formula" if target == "C5" else backend_of(layers[target, norm], x),
                    quartiles_of_ratio(times, f"{target} {norm}", to=""),
                    bound,
                    limit,
                )


def _step_of(target: str, layer: nn.Module, x: Tensor, grad: Tensor) -> Call:
    step = layer_step(layer, x, grad)
    return partial(_without_kernels, step) if target == "C5" else step


def _without_kernels(step: Call) -> None:
    with formula_alone():
        step()


def measure_fused(plan: Plan, targets: Set[str]) -> Iterator[Result]:
    """Yield C2 and C3."""
    for shape, layout in product(plan.shapes, LAYOUTS):
        x, grad = draw_input(shape, layout, "fp32")
        plain = nn.Sequential(nn.BatchNorm2d(shape[1]), nn.ReLU())
        fused = fuse(plain, "relu")
        row = partial(Measurement, case=str(shape), backend=backend_of(fused[0], x))
        if "C2" in targets:
            nets = {"plain": plain, "fused": fused}
            times = time_rounds(
                {n: layer_step(net, x, grad) for n, net in nets.items()}, plan.rounds
            )
            ratio = quartiles_of_ratio(times, "fused", to="plain")
            what = f"L1 BN+ReLU fused / BN, ReLU, {layout}"
            yield row("C2", what, quartiles=ratio, bound=Bound(0.6), limit="0.35")
        if "C3" in targets:
            own, other = (count_saved_bytes(net, partial(net, x)) for net in (fused, plain))
            what = f"saved bytes of L1 BN+ReLU fused / BN, ReLU, {layout}"
            yield row("C3", what, quartiles=exactly(own / other), bound=Bound(0.55), limit="0.5")


def fuse(net: nn.Sequential, how: str) -> nn.Sequential:
    """Return a copy whose batch norms are L1 and fused with what follows."""
    fused = copy.deepcopy(net)
    swap_norms(fused, "l1", fuse=how)
    return fused


def draw_input(shape: Shape, layout: str, type_name: str) -> tuple[Tensor, Tensor]:
    """Return an input that wants a gradient, and the gradient of the output."""
    dtype, memory_format = TYPES[type_name], LAYOUTS[layout]
    x = (torch.randn(shape) * 1.5 + 0.3).to(dtype).contiguous(memory_format=memory_format)
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
