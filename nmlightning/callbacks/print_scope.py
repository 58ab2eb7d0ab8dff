"""The table of what a rule steers, at the start of a fit."""

from collections.abc import Sequence

from pytorch_lightning.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table

from nmlightning.weights.steering.attachment import Attachment


@rank_zero_only
def print_scope(rule: str, attachments: Sequence[Attachment]) -> None:
    """Print to stderr which weights are steered and which are left, with the reason."""
    reasons = {name: why for each in attachments for name, why in each.reasons().items()}
    steered = sum(why.startswith("steered") for why in reasons.values())
    table = Table("weight", "steering", title=f"{rule} steers {steered} of {len(reasons)} weights")
    for name, why in reasons.items():
        table.add_row(name, why)
    Console(stderr=True).print(table)
