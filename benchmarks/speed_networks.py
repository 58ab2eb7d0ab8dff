"""C6 to C8: a training step of a whole network on the CPU, its activations, and it compiled."""

import copy
from collections.abc import Iterator, Set
from functools import partial

import torch
from backends import backend_of
from interleaved import Quartiles, quartiles_of_ratio, time_rounds
from norm_layers import LAYOUTS
from saved_bytes import count_saved_bytes
from speed_plan import Plan
from targets import Bound, Measurement, Result
from torch import nn
from training_step import NETS, draw_images, make_step_of

from nmlightning import swap_norms

# What is fused: the bounds of C6, the time, and of C7, the saved bytes.
FUSED: dict[str | None, tuple[str, Bound | None, Bound | None]] = {
    None: ("L1", None, None),
    "relu": ("L1, ReLU fused", Bound(0.92), Bound(0.8)),
    "add_relu": ("L1, add and ReLU fused", Bound(0.85), Bound(0.6)),
}


def measure_step(plan: Plan, targets: Set[str]) -> Iterator[Result]:
    """Yield C6: the step in both layouts."""
    for layout, memory_format in LAYOUTS.items():
        images = draw_images(plan.net, plan.batch, memory_format=memory_format)
        nets = {name: net.to(memory_format=memory_format) for name, net in _make_nets(plan).items()}
        steps = {name: make_step_of(net, images).run for name, net in nets.items()}
        times = time_rounds(steps, plan.net_rounds, warm_up=1)
        for what, bound, _ in FUSED.values():
            yield Measurement(
                "C6",
                f"step with {what} / BN, {layout}",
                f"{plan.net}, batch {plan.batch}",
                backend_of(nets[what].bn1, images),
                quartiles_of_ratio(times, what, to="BN"),
                bound,
                "0.75",
            )


def measure_activations(plan: Plan, targets: Set[str]) -> Iterator[Result]:
    """Yield C7: what a forward keeps for its backward."""
    images = draw_images(plan.net, plan.batch)
    nets = _make_nets(plan)
    saved = {name: count_saved_bytes(net, partial(net, images)) for name, net in nets.items()}
    for what, _, bound in FUSED.values():
        ratio = saved[what] / saved["BN"]
        yield Measurement(
            "C7",
            f"activations with {what} / BN",
            f"{plan.net}, batch {plan.batch}, {saved['BN'] / 1e6:.0f} MB with BN",
            backend_of(nets[what].bn1, images),
            Quartiles(ratio, ratio, ratio),
            bound,
            "0.50",
        )


def measure_compiled(plan: Plan, targets: Set[str]) -> Iterator[Result]:
    """Yield C8: the step of a compiled network."""
    images = draw_images(plan.compiled_net, plan.batch)
    nets = {"BN": NETS[plan.compiled_net][0]()}
    nets["L1"] = copy.deepcopy(nets["BN"])
    swap_norms(nets["L1"], "l1")
    torch.compiler.reset()
    for net in nets.values():
        net.compile(backend=plan.compiler)
    steps = {name: make_step_of(net, images).run for name, net in nets.items()}
    times = time_rounds(steps, plan.rounds // 2 + 1)
    yield Measurement(
        "C8",
        "compiled step with L1 / BN",
        f"{plan.compiled_net}, batch {plan.batch}, NCHW",
        "compiled formula",
        quartiles_of_ratio(times, "L1", to="BN"),
        Bound(1.02),
    )


def _make_nets(plan: Plan) -> dict[str, nn.Module]:
    """Return the network with batch norm, and with L1 fused in each way."""
    nets = {"BN": NETS[plan.net][0]()}
    for fused, (what, *_) in FUSED.items():
        nets[what] = copy.deepcopy(nets["BN"])
        swap_norms(nets[what], "l1", fuse=fused)
    return nets
