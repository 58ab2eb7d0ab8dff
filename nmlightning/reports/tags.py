"""The names that weight norms have in a run's logs, and the TensorBoard page that shows them."""

import re
from collections.abc import Sequence
from typing import Any

SKIPPED_STEPS = "optimizer/skipped_steps"
STEERING_SKIPPED = "steering/skipped_steps"

Layout = dict[str, dict[str, list[Any]]]


def norm_tag(layer: str, statistic: str = "") -> str:
    """Return the tag of the `min`, `mean` or `max` of a layer's norms; alone, of all of them."""
    return "/".join(filter(None, ("weight_norm", layer, statistic)))


def norm_map_tag(layer: str) -> str:
    """Return the tag of the picture of a layer's norms over the epochs.

    TensorBoard shows nothing under a tag that another kind of thing has, as the histograms do.
    """
    return f"weight_norm_map/{layer}"


def effective_lr_tag(layer: str) -> str:
    """Return the tag of the median effective learning rate of a layer's channels."""
    return f"effective_lr/{layer}"


def rotation_tag(layer: str) -> str:
    """Return the tag of the root mean square rotation of a layer's channels in one step."""
    return f"rotation/{layer}"


def equilibrium_tag(layer: str) -> str:
    """Return the tag of the rotation at which weight decay and learning balance."""
    return f"rotation_equilibrium/{layer}"


def factor_tag(layer: str, statistic: str) -> str:
    """Return the tag of the `min`, `mean` or `max` factor that steering gave a layer's steps."""
    return f"correction_factor/{layer}/{statistic}"


def layer_of(weight: str) -> str:
    """Return the name of the layer that a weight belongs to."""
    return weight.removesuffix(".weight")


def dashboard_layout(layers: Sequence[str]) -> Layout:
    """Return the page of TensorBoard's Custom Scalars: categories of charts of tags.

    "Margin" is a line within a band, of three tags; "Multiline" has a line for each tag that one of
    its regular expressions matches.
    """
    return {
        "Run": {
            "accuracy or BLEU": _lines(r".*(top1|acc|bleu)"),
            "loss": _lines(r".*loss"),
            "skipped (non-finite) steps": _lines(SKIPPED_STEPS, STEERING_SKIPPED),
        },
        "All layers": {
            "norm, mean over channels": _lines(norm_tag(".*", "mean")),
            "effective learning rate, median over channels": _lines(effective_lr_tag("")),
            "rotation per step, radians": _lines(rotation_tag("")),
            "correction factor, mean over channels": _lines(factor_tag(".*", "mean")),
            "correction factor, largest channel": _lines(factor_tag(".*", "max")),
        },
        "Norms: mean, from the smallest channel to the largest": {
            layer: ["Margin", [norm_tag(layer, name) for name in ("mean", "min", "max")]]
            for layer in layers
        },
        "Rotation per step against its equilibrium, radians": {
            layer: _lines(*(re.escape(tag(layer)) + "$" for tag in (rotation_tag, equilibrium_tag)))
            for layer in layers
        },
    }


def _lines(*patterns: str) -> list[Any]:
    return ["Multiline", list(patterns)]
