"""H1 to H4: a norm layer on a GPU in bf16, against torch's own and the floor of its bytes.

The floor is the time of reading and writing the tensors as often as a batch norm has to, 8 passes
of forward and backward together, at the bandwidth with which this device copies. All are replayed
as CUDA graphs, so that none waits for the host; for small tensors H4 is also timed from Python.
"""

import copy
from collections.abc import Iterator, Set
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from interleaved import Call, quartiles_of, quartiles_of_ratio, seconds_of, time_rounds
from norm_layers import backend_of, layer_step
from speed_layers import NORMS, draw_input, swapped
from speed_plan import Plan
from targets import Bound, Measurement, Result, Skipped
from torch import Tensor, nn

PASSES = 8
COPIED = 2**31  # bytes: far more than any cache holds
REPEATS = 10
SMALL = 20e6  # bytes of a tensor, up to which H4 is timed from Python, too
LARGE = 100e6  # bytes of a tensor, from which H2 counts


def measure_gpu_layers(plan: Plan, targets: Set[str], device: str = "cuda") -> Iterator[Result]:
    """Yield H1 to H4."""
    if "H3" in targets:
        yield Skipped("H3", "pilot statistics are not built")
    bandwidth = copy_bandwidth(device)
    for number, shape in enumerate(plan.gpu_shapes):
        for layout in ("NHWC", "NCHW"):
            x, grad = draw_input(shape, layout, "bf16", device)
            case = f"{shape} {layout} bf16"
            # H1 is aimed at the first shape in channels_last; the others stand beside it.
            aim = number == 0 and layout == "NHWC"
            if targets & {"H1", "H2"}:
                floor = PASSES * x.numel() * x.element_size() / bandwidth
                yield from _measure_norms(plan, targets, x, grad, case, floor, aim)
            if "H4" in targets:
                yield from _measure_fused(plan, x, grad, case)


def _measure_norms(
    plan: Plan, targets: Set[str], x: Tensor, grad: Tensor, case: str, floor: float, aim: bool
) -> Iterator[Result]:
    device, channels = str(x.device), x.shape[1]
    torch.compiler.reset()
    native, compiled = (nn.BatchNorm2d(channels, device=x.device) for _ in range(2))
    compiled.compile(dynamic=False, backend=plan.compiler)
    layers = {name: kind(channels, device=x.device) for name, kind in NORMS.items()}
    nets = {"native": native, "compiled": compiled, **layers}
    steps = {name: layer_step(net, x, grad) for name, net in nets.items()}
    graphs = {name: as_graph(step, device) for name, step in steps.items()}
    times = time_rounds(graphs, plan.rounds, device=device)
    if "H1" in targets:
        best = min(("native", "compiled"), key=lambda name: sum(times[name]))
        row = partial(Measurement, "H1", case=case, backend=backend_of(layers["L1"], x))
        yield row(
            what=f"byte floor ({floor * 1e3:.3f} ms) / L1 BN",
            quartiles=quartiles_of([REPEATS * floor / seconds for seconds in times["L1"]]),
            bound=Bound(0.8, is_least=True) if aim else None,
        )
        yield row(
            what="L1 BN / the better of native and compiled BN",
            quartiles=quartiles_of_ratio(times, "L1", to=best),
            bound=Bound(1.05) if aim else None,
        )
    if "H2" in targets:
        large = x.numel() * x.element_size() > LARGE
        for name in ("L∞", "Top(10)"):
            yield Measurement(
                "H2",
                f"{name} BN / BN, tensors {'over' if large else 'up to'} {LARGE / 1e6:.0f} MB",
                case,
                backend_of(layers[name], x),
                quartiles_of_ratio(times, name, to="native"),
                Bound(0.95) if large and name == "L∞" else None,
            )


def _measure_fused(plan: Plan, x: Tensor, grad: Tensor, case: str) -> Iterator[Measurement]:
    """Compare with cuDNN or ATen, torch.compile and, where it can be imported, attorch."""
    torch.compiler.reset()
    device = str(x.device)
    plain = nn.Sequential(nn.BatchNorm2d(x.shape[1]), nn.ReLU()).to(x.device)
    compiled, fused = copy.deepcopy(plain), swapped(plain, "relu")
    compiled.compile(dynamic=False, backend=plan.compiler)
    nets = {"BN, ReLU": plain, "fused": fused, "compiled BN, ReLU": compiled}
    if device != "cpu" and (attorch := _attorch_of(x)) is not None:
        nets["attorch's BN, ReLU"] = attorch
    steps = {name: layer_step(net, x, grad) for name, net in nets.items()}
    graphs = {name: as_graph(step, device) for name, step in steps.items()}
    times = time_rounds(graphs, plan.rounds, device=device)
    row = partial(Measurement, "H4", case=case, backend=backend_of(fused[0], x))
    for rival in set(nets) - {"fused"}:
        bound = Bound(0.75) if rival == "BN, ReLU" else None
        ratio = quartiles_of_ratio(times, "fused", to=rival)
        yield row(what=f"L1 BN+ReLU fused / {rival}", quartiles=ratio, bound=bound)
    if x.numel() * x.element_size() < SMALL:
        times = time_rounds(steps, plan.rounds, device=device, repeats=REPEATS)
        what = "L1 BN+ReLU fused / BN, ReLU, from Python"
        yield row(what=what, quartiles=quartiles_of_ratio(times, "fused", to="BN, ReLU"))


def _attorch_of(x: Tensor) -> nn.Module | None:
    """Return BobMcDear/attorch's batch norm with ReLU, if its checkout is on PYTHONPATH."""
    if find_spec("attorch") is None:
        return None
    norm: nn.Module = import_module("attorch").BatchNorm2d(x.shape[1], act_func="relu")
    return norm.to(x.device)


def as_graph(step: Call, device: str) -> Call:
    """Return what repeats a step, on a GPU as one CUDA graph."""

    def repeat() -> None:
        for _ in range(REPEATS):
            step()

    if not device.startswith("cuda"):
        return repeat
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, which a capture must not
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        repeat()
    return graph.replay


def copy_bandwidth(device: str, size: int = COPIED) -> float:
    """Return the bytes a second, read and written together, with which the device copies."""
    size = size if device.startswith("cuda") else size >> 7
    source = torch.randint(255, (size,), dtype=torch.uint8, device=device)  # zeros are compressed
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    seconds_of(copy, device, REPEATS)
    return 2 * source.numel() / min(seconds_of(copy, device, REPEATS) for _ in range(5))
