"""N7, C7 and N10: a training step of a network on the CPU, its activations, and it compiled."""

import copy
from collections.abc import Iterator, Set
from functools import partial

import torch
from norm_layers import LAYOUTS, backend_of
from sampled import sample_rounds
from speed_layers import count_saved_bytes, exactly, swapped
from speed_plan import TYPES, Plan
from targets import Bound, Measurement, Result
from torch import nn
from training_step import NETS, draw_images, make_step_of

# What is fused, and the bound of C7, the saved bytes.
FUSED: dict[str | None, tuple[str, Bound | None]] = {
    None: ("L1", None),
    "relu": ("L1, ReLU fused", Bound(0.8)),
    "add_relu": ("L1, add and ReLU fused", Bound(0.6)),
}
SETTINGS = {("fp32", "NCHW"): 0.84, ("fp32", "NHWC"): 0.92, ("bf16", "NHWC"): 0.9}
SMALL_BATCH = 32  # of N7's smaller network


def measure_step(plan: Plan, targets: Set[str]) -> Iterator[Result]:
    """Yield N7: the step in both layouts, and in bf16."""
    for name, batch in ((plan.small_net, min(SMALL_BATCH, plan.batch)), (plan.net, plan.batch)):
        nets = {"BN": NETS[name][0]()}
        for how in (None, "add_relu") if name == plan.small_net else ("add_relu",):
            nets[FUSED[how][0]] = swapped(nets["BN"], how)
        nets["no norm"] = without_norms(nets["BN"])
        for (dtype, layout), bound in SETTINGS.items():
            images = draw_images(name, batch, memory_format=LAYOUTS[layout])
            autocast = TYPES[dtype] if dtype != "fp32" else None
            steps = {
                what: make_step_of(net.to(memory_format=LAYOUTS[layout]), images, autocast).run
                for what, net in nets.items()
            }
            rounds = sample_rounds(steps, plan.net_pace)
            for what in [what for what in nets if what != "BN"]:
                yield Measurement(
                    "N7",
                    f"step with {what} / BN, {dtype} {layout}",
                    f"{name}, batch {batch}",
                    "",
                    rounds.figure(what, to="BN"),
                    Bound(bound, each=bound) if "fused" in what else None,
                )


def measure_activations(plan: Plan, targets: Set[str]) -> Iterator[Result]:
    """Yield C7: what a forward keeps for its backward."""
    images = draw_images(plan.net, plan.batch)
    plain = NETS[plan.net][0]()
    bytes_of_plain = count_saved_bytes(plain, partial(plain, images))
    for how, (what, bound) in FUSED.items():
        net = swapped(plain, how)
        yield Measurement(
            "C7",
            f"activations with {what} / BN",
            f"{plan.net}, batch {plan.batch}, {bytes_of_plain / 1e6:.0f} MB with BN",
            backend_of(net.bn1, images),  # type: ignore[arg-type]
            exactly(count_saved_bytes(net, partial(net, images)) / bytes_of_plain),
            bound,
        )


def measure_compiled(plan: Plan, targets: Set[str]) -> Iterator[Result]:
    """Yield N10: the step of a compiled network."""
    images = draw_images(plan.small_net, plan.batch)
    nets = {"BN": NETS[plan.small_net][0]()}
    nets["L1"] = swapped(nets["BN"], None)
    torch.compiler.reset()
    for net in nets.values():
        net.compile(backend=plan.compiler)
    steps = {name: make_step_of(net, images).run for name, net in nets.items()}
    rounds = sample_rounds(steps, plan.net_pace)
    case = f"{plan.small_net}, batch {plan.batch}, fp32 NCHW"
    figure = rounds.figure("L1", to="BN")
    yield Measurement(
        "N10", "compiled step with L1 / BN", case, "compiled formula", figure, Bound(1.02)
    )


def without_norms(net: nn.Module) -> nn.Module:
    """Return a copy without norms: the most that faster ones can gain."""
    copied = copy.deepcopy(net)
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return copied
