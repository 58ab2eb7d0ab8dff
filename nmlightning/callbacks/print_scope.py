"""The table of what a rule steers, at the start of a fit."""

from collections.abc import Sequence

from pytorch_lightning.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import Optimizer

from nmlightning.weights.optimizer_family import group_numbers
from nmlightning.weights.steering import Steering
from nmlightning.weights.steering.attachment import Attachment
from nmlightning.weights.steering.choose_weights import why_left
from nmlightning.weights.steering.named_weights import NamedWeights


def explain_scope(
    steering: Steering,
    attachments: Sequence[Attachment],
    model: nn.Module,
    optimizers: Sequence[Optimizer],
) -> dict[str, str]:
    """Return for each weight of a convolution or linear layer why it is steered, or is left."""
    optimized = {q for optimizer in optimizers for q in group_numbers(optimizer)}
    choice = steering.include, steering.exclude, steering.least_dims
    weights = NamedWeights.of(model)
    reasons = {
        name: f"left: {why_left(weights, name, optimized, *choice)}"
        for name in weights.parameters
        if name in (weights.layers or ())
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
    steered = sum(len(attachment.steered) for attachment in attachments)
    title = f"{type(steering).__name__} steers {steered} of {len(reasons)} weights"
    table = Table("weight", "steering", title=title)
    for name, why in reasons.items():
        table.add_row(name, why)
    Console(stderr=True).print(table)
