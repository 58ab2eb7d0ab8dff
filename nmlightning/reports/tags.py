"""The names of weight norms and angles in a run's logs, and the TensorBoard page of them."""

import re
from collections.abc import Collection, Iterable
from itertools import product
from typing import Any

SKIPPED_STEPS = "optimizer/skipped_steps"
STEERING_SKIPPED = "steering/skipped_steps"
# Before the name of a layer:
NORM_MAP = "weight_norm_map/"  # a picture; TensorBoard shows none under the tag of a histogram
EFFECTIVE_LR = "effective_lr/"  # the median of the channels
ROTATION = "rotation/"  # of the channels in one step, root mean square
EQUILIBRIUM = "rotation_equilibrium/"  # where weight decay and learning balance
COSINE = "weight_gradient_cosine"
ROUNDED = ("input", "weight", "gradient")  # of a layer in int8

Layout = dict[str, dict[str, list[Any]]]

_MOST_LAYERS = 24  # in a chart


def norm_tag(layer: str, statistic: str = "") -> str:
    """Return the tag of the `min`, `mean` or `max` of a layer's norms; alone, of all of them."""
    return "/".join(filter(None, ("weight_norm", layer, statistic)))


def factor_tag(layer: str, statistic: str) -> str:
    """Return the tag of the `min`, `mean` or `max` factor that steering gave a layer's steps."""
    return f"correction_factor/{layer}/{statistic}"


def angle_tag(layer: str, tensor: str) -> str:
    """Return the tag of the angle by which rounding turns one of `ROUNDED` of a layer."""
    return f"int8_angle/{layer}/{tensor}"


def layer_of(weight: str) -> str:
    return weight.removesuffix(".weight")


# What a step of a layer is measured by, beside the norms: the name, and a title.
QUANTITIES = {
    EFFECTIVE_LR[:-1]: "Effective learning rate, median over channels",
    ROTATION[:-1]: "Rotation per step, radians",
    "step_norm": "Length of a step, root mean square over channels",
    "update_ratio": "Length of a step by that of the weight",
    "gradient_norm": "Gradient, root mean square over channels",
    "unclipped_gradient_norm": "Gradient before it is clipped",
    COSINE: "Cosine of weight and gradient",
    "spectral_norm": "Spectral norm",
}
_OVERVIEW = {
    "Norm, mean over channels": norm_tag("{layer}", "mean"),
    **{title: f"{name}/{{layer}}" for name, title in QUANTITIES.items()},
    "Correction factor, mean over channels": factor_tag("{layer}", "mean"),
    "Correction factor, largest channel": factor_tag("{layer}", "max"),
    **{f"Angle of rounding the {x}, degrees": angle_tag("{layer}", x) for x in ROUNDED},
}
_BAND = ("mean", "min", "max")
_DETAILS = {
    "norms, mean and smallest to largest channel": [norm_tag("{layer}", x) for x in _BAND],
    "rotation and its equilibrium, radians": [x + "{layer}" for x in (ROTATION, EQUILIBRIUM)],
    "correction factors, mean and smallest to largest": [factor_tag("{layer}", x) for x in _BAND],
}


def group_by_stage(layers: Collection[str], parts: int = 1) -> dict[str, list[str]]:
    """Return the layers of each stage of a network, such as `net.layer1` of a ResNet.

    A stage is what shares the first `parts` of its names, split at dots; where that would be
    everything, or more layers than one chart can show, one part more, down to blocks and layers.
    """
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(".".join(layer.split(".")[:parts]), []).append(layer)
    if len(groups) == len(layers) > 1:  # of single layers
        return {".".join(next(iter(layers)).split(".")[: parts - 1]) or "all layers": [*layers]}
    stages: dict[str, list[str]] = {}
    for name, group in groups.items():
        is_whole = len(group) == 1 or (len(groups) > 1 and len(group) <= _MOST_LAYERS)
        stages |= {name: group} if is_whole else group_by_stage(group, parts + 1)
    return stages


def dashboard_layout(
    layers: Collection[str], logged: Collection[str], metrics: Iterable[str], prefix: str = ""
) -> Layout:
    """Return the page of TensorBoard's Custom Scalars: categories of charts of tags.

    Its charts are of the tags that are `logged`, which have the prefix there, and of `metrics`.

    "Margin" is a line within a band, of three tags; "Multiline" has a line for each tag that one of
    its regular expressions matches. TensorBoard gives all lines of a run one colour, hence charts
    for each stage of the network, and then for each layer.
    """
    stages = group_by_stage(layers)
    layout: Layout = {"Validation": {}, "Training": {}}
    skipped = [prefix + tag for tag in (SKIPPED_STEPS, STEERING_SKIPPED) if tag in logged]
    for metric in (*sorted(metrics), *skipped):
        stage = "Validation" if "val" in metric.lower() else "Training"
        layout[stage][metric] = _lines(metric)
    for title, tag in _OVERVIEW.items():
        start, end = map(re.escape, (prefix + tag).split("{layer}"))
        charts = layout[f"{title}: a line a layer"] = {}
        for stage, members in stages.items():
            if any(tag.replace("{layer}", layer) in logged for layer in members):
                names = ".+" if len(stages) == 1 else re.escape(stage) + r"(\..+)?"
                charts[stage] = ["Multiline", [f"{start}{names}{end}$"]]
    for (stage, members), (title, tags) in product(stages.items(), _DETAILS.items()):
        charts = layout[f"{stage}: {title}"] = {}
        for layer in members:
            shown = [t.replace("{layer}", layer) for t in tags]
            if all(tag in logged for tag in shown):
                shown = [prefix + tag for tag in shown]
                charts[layer] = ["Margin", shown] if len(shown) == 3 else _lines(*shown)
    return {prefix + title: charts for title, charts in layout.items() if charts}


def _lines(*tags: str) -> list[Any]:
    return ["Multiline", [f"{re.escape(tag)}$" for tag in tags]]
