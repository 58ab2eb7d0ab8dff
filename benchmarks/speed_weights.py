"""N6, N11 and C11: normalising weights and recording their norms, as shares of a step."""

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import torch
from interleaved import Call
from sampled import Rounds, sample_rounds
from speed_plan import Plan
from targets import Bound, Measurement, Result
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from training_step import make_step
from translation import make_step as make_translation_step
from weight_norms import make_record

from nmlightning import apply_weight_norm
from nmlightning.models import Transformer

EVERY = 10  # steps between two records of the second figure
POWERS = {"1": 1, "2": 2, "∞": math.inf}


def measure_weight_norm(plan: Plan, targets: Set[str]) -> Iterator[Result]:
    """Yield N6: bounded weight norm of a step, and against torch's weight norm."""
    batch = plan.batch // 2
    step = make_step(plan.net, batch, "cpu")
    forms = {name: functools.partial(apply_weight_norm, p=p) for name, p in POWERS.items()}
    calls = {n: make_addition(copy.deepcopy(step.net), form) for n, form in forms.items()}
    calls["torch"] = make_addition(copy.deepcopy(step.net), by_torch)
    rounds = sample_rounds({"step": step.run, **calls}, plan.net_pace)
    row = functools.partial(Measurement, "N6", case=f"{plan.net}, batch {batch}", backend="")
    for name in forms:
        share = rounds.figure(name, to="step").times(100)
        what = f"bounded weight norm, p = {name}, of a step"
        yield row(what, quartiles=share, bound=Bound(0.2), unit="%")
        what = f"bounded weight norm, p = {name} / torch's weight_norm"
        yield row(what, quartiles=rounds.figure(name, to="torch"), bound=Bound(1))


def measure_records(plan: Plan, targets: Set[str]) -> Iterator[Result]:
    """Yield N11, of ResNet-50 and the Transformer, and C11."""
    step = make_step(plan.large_net, plan.large_batch, "cpu")
    calls = {"step": step.run, "record": make_record(step.net)}
    calls["bounded"] = make_addition(copy.deepcopy(step.net), apply_weight_norm)
    rounds = sample_rounds(calls, plan.net_pace)
    case = f"batch {plan.large_batch}"
    if "N11" in targets:
        yield from rows_of_recording(plan.large_net, case, rounds)
    if "C11" in targets:
        share = rounds.figure("bounded", to="step").times(100)
        what = f"bounded weight norm, of a step of {plan.large_net}"
        yield Measurement("C11", what, case, "", share, Bound(2.5), "%")
    if "N11" in targets:
        sizes = {"encoder_layers": plan.layers, "decoder_layers": plan.layers}
        net = Transformer(plan.vocabulary, width=plan.width, hidden=4 * plan.width, **sizes)
        calls = {"step": make_translation_step(net, plan.sentences, plan.words)}
        rounds = sample_rounds({**calls, "record": make_record(net)}, plan.net_pace)
        case = f"{plan.sentences} pairs of {plan.words} tokens"
        yield from rows_of_recording("Transformer-base", case, rounds)


def rows_of_recording(net: str, case: str, rounds: Rounds) -> Iterator[Measurement]:
    """Yield the share of a record each step and, a tenth of it, of one each 10 steps."""
    share = rounds.figure("record", to="step").times(100)
    for moment, steps, bound in (("step", 1, Bound(0.6)), (f"{EVERY} steps", EVERY, Bound(0.1))):
        what = f"recording the norms every {moment}, of a step of {net}"
        yield Measurement("N11", what, case, "", share.times(1 / steps), bound, "%")


def by_torch(net: nn.Module) -> None:
    """Normalise the convolutions by torch."""
    for conv in convs(net):
        parametrizations.weight_norm(conv)


class Rest(torch.autograd.Function):
    """Gives the weights their gradients from inside of backward, as the rest of a network does.

    `torch.autograd.grad` checks each gradient that it is given, which no training step pays for.
    """

    @staticmethod
    def forward(ctx: Any, grads: Sequence[Tensor], *weights: Tensor) -> Tensor:
        ctx.grads = grads
        return weights[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return None, *ctx.grads


def make_addition(net: nn.Module, normalise: Callable[[nn.Module], object]) -> Call:
    """Return what normalised weights add to a step, but to the first.

    All weights, and the gradients of what they are computed from, and what ours do after a step.
    """
    normalise(net)
    layers = convs(net)
    originals = [q for layer in layers for q in layer.parametrizations.parameters()]  # type: ignore[union-attr]
    grads = [torch.randn_like(layer.weight) for layer in layers]
    idle = torch.optim.SGD(originals, 0.0)  # It has no gradients: its step calls the hooks alone.
    net.forward = lambda: [layer.weight for layer in layers]  # what a forward reads

    def run() -> None:
        torch.autograd.grad(Rest.apply(grads, *net()), originals)  # type: ignore[no-untyped-call]
        idle.step()

    return run


def convs(net: nn.Module) -> list[nn.Conv2d]:
    """Return the convolutions."""
    return [module for module in net.modules() if isinstance(module, nn.Conv2d)]
