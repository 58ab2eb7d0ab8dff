"""The table of what a rule steers, at the start of a fit."""

from collections.abc import Sequence

from pytorch_lightning.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import Optimizer

from nmlightning.weights.layer_weights import find_layer_weights
from nmlightning.weights.steering import (
    DecayEquivalentLR,
    Hyperball,
    LRCorrection,
    NormSchedule,
    RadialProjection,
)
from nmlightning.weights.steering.attachment import Attachment
from nmlightning.weights.steering.choose_weights import why_left

Referenced = LRCorrection | NormSchedule
Steering = Referenced | DecayEquivalentLR | Hyperball | RadialProjection


def explain_scope(
    steering: Steering,
    attachments: Sequence[Attachment],
    model: nn.Module,
    optimizers: Sequence[Optimizer],
) -> dict[str, str]:
    """Return for each weight of a convolution or linear layer why it is steered, or is left."""
    optimized = {q for each in optimizers for group in each.param_groups for q in group["params"]}
    choice = steering.include, steering.exclude, steering.least_dims
    reasons = {
        weight.name: f"left: {why_left(weight.name, weight.parameter, optimized, *choice)}"
        for weight in find_layer_weights(model)
    }
    for attachment in attachments:
        reasons |= attachment.reasons()
    return reasons


@rank_zero_only
def print_scope(
    steering: Steering,
    attachments: Sequence[Attachment],
    model: nn.Module,
    optimizers: Sequence[Optimizer],
) -> None:
    """Print to stderr which weights are steered and which are left, with the reason."""
    reasons = explain_scope(steering, attachments, model, optimizers)
    steered = sum(why.startswith("steered") for why in reasons.values())
    title = f"{type(steering).__name__} steers {steered} of {len(reasons)} weights"
    table = Table("weight", "steering", title=title)
    for name, why in reasons.items():
        table.add_row(name, why)
    Console(stderr=True).print(table)
