"""C10 and C11: recording the norms of weights and normalising them, as shares of a step."""

import copy
from collections.abc import Iterator, Set

from interleaved import Quartiles, quartiles_of_ratio, time_rounds
from normalised_weights import make_addition
from speed_plan import Plan
from targets import Bound, Measurement, Result
from training_step import make_step
from translation import make_step as make_translation_step
from weight_norms import make_record

from nmlightning import apply_weight_norm
from nmlightning.models import Transformer

EVERY = 10  # steps between two records of the second figure


def measure_weights(plan: Plan, targets: Set[str]) -> Iterator[Result]:
    """Yield C10 and C11, of both networks for images and, C10 alone, of the Transformer."""
    images = ((plan.net, plan.batch, Bound(0.2)), (plan.large_net, plan.large_batch, Bound(2.5)))
    for name, batch, bound in images:
        step = make_step(name, batch, "cpu")
        step.run()
        calls = {"step": step.run}
        if "C10" in targets:
            calls["record"] = make_record(step.net)
        if "C11" in targets:
            calls["bounded"] = make_addition(copy.deepcopy(step.net), apply_weight_norm)
        times = time_rounds(calls, plan.net_rounds, warm_up=1)
        if "C10" in targets:
            yield from rows_of_recording(
                name, f"batch {batch}", quartiles_of_ratio(times, "record", to="step")
            )
        if "C11" in targets:
            share = percent(quartiles_of_ratio(times, "bounded", to="step"))
            what = f"bounded weight norm, of a step of {name}"
            yield Measurement(
                "C11", what, f"batch {batch}", "", share, bound, "two row passes", "%"
            )
    if "C10" in targets:
        yield from _measure_transformer(plan)


def _measure_transformer(plan: Plan) -> Iterator[Result]:
    sizes = {"hidden": 4 * plan.width, "encoder_layers": plan.layers, "decoder_layers": plan.layers}
    net = Transformer(plan.vocabulary, width=plan.width, **sizes)
    step = make_translation_step(net, plan.sentences, plan.words)
    times = time_rounds({"step": step, "record": make_record(net)}, plan.net_rounds, warm_up=1)
    case = f"{plan.sentences} pairs of {plan.words} tokens"
    yield from rows_of_recording(
        "Transformer-base", case, quartiles_of_ratio(times, "record", to="step")
    )


def rows_of_recording(net: str, case: str, share: Quartiles) -> Iterator[Measurement]:
    """Yield the share of a record each step and, a tenth of it, of one each 10 steps."""
    for moment, steps, bound in (("step", 1, Bound(0.6)), (f"{EVERY} steps", EVERY, Bound(0.1))):
        what = f"recording the norms every {moment}, of a step of {net}"
        spread = Quartiles(*(value / steps for value in percent(share)))
        yield Measurement("C10", what, case, "", spread, bound, "one read", "%")


def percent(share: Quartiles) -> Quartiles:
    """Return a share in percent."""
    return Quartiles(*(100 * value for value in share))
