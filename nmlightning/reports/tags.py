"""The names that weight norms have in a run's logs, and the TensorBoard page that shows them."""

import re
from collections.abc import Sequence
from typing import Any

SKIPPED_STEPS = "optimizer/skipped_steps"
STEERING_SKIPPED = "steering/skipped_steps"
# Before the name of a layer:
NORM_MAP = "weight_norm_map/"  # a picture; TensorBoard shows none under the tag of a histogram
EFFECTIVE_LR = "effective_lr/"  # the median of the channels
ROTATION = "rotation/"  # of the channels in one step, root mean square
EQUILIBRIUM = "rotation_equilibrium/"  # where weight decay and learning balance

Layout = dict[str, dict[str, list[Any]]]


def norm_tag(layer: str, statistic: str = "") -> str:
    """Return the tag of the `min`, `mean` or `max` of a layer's norms; alone, of all of them."""
    return "/".join(filter(None, ("weight_norm", layer, statistic)))


def factor_tag(layer: str, statistic: str) -> str:
    """Return the tag of the `min`, `mean` or `max` factor that steering gave a layer's steps."""
    return f"correction_factor/{layer}/{statistic}"


def layer_of(weight: str) -> str:
    """Return the name of the layer that a weight belongs to."""
    return weight.removesuffix(".weight")


def dashboard_layout(layers: Sequence[str], prefix: str = "") -> Layout:
    """Return the page of TensorBoard's Custom Scalars: categories of charts of tags.

    With a prefix, the part of it that is of the tags, and titles, that have that prefix.

    "Margin" is a line within a band, of three tags; "Multiline" has a line for each tag that one of
    its regular expressions matches.
    """
    layout: Layout = {
        "Run": {
            "accuracy or BLEU": _lines(r".*(top1|acc|bleu)"),
            "loss": _lines(r".*loss"),
            "skipped (non-finite) steps": _lines(SKIPPED_STEPS, STEERING_SKIPPED),
        },
        "All layers": {
            "norm, mean over channels": _lines(norm_tag(".*", "mean")),
            "effective learning rate, median over channels": _lines(EFFECTIVE_LR),
            "rotation per step, radians": _lines(ROTATION),
            "correction factor, mean over channels": _lines(factor_tag(".*", "mean")),
            "correction factor, largest channel": _lines(factor_tag(".*", "max")),
        },
        "Norms: mean, from the smallest channel to the largest": {
            layer: ["Margin", [norm_tag(layer, name) for name in ("mean", "min", "max")]]
            for layer in layers
        },
        "Rotation per step against its equilibrium, radians": {
            layer: _lines(*(re.escape(tag + layer) + "$" for tag in (ROTATION, EQUILIBRIUM)))
            for layer in layers
        },
    }
    if not prefix:
        return layout
    del layout["Run"]
    return {
        prefix + category: {
            title: [kind, [prefix + tag for tag in shown]]
            for title, (kind, shown) in charts.items()
        }
        for category, charts in layout.items()
    }


def _lines(*patterns: str) -> list[Any]:
    return ["Multiline", list(patterns)]
