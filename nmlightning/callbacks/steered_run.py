"""A rule at work on the optimizers of a Trainer, for one fit."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from nmlightning.callbacks.epoch_clock import EpochClock
from nmlightning.callbacks.print_scope import Referenced, Steering, print_scope
from nmlightning.callbacks.provenance import check_same_run
from nmlightning.compat import global_seed
from nmlightning.weights.history import NormHistory
from nmlightning.weights.layer_weights import find_layer_weights
from nmlightning.weights.recording_file import find_recording
from nmlightning.weights.steering.attachment import Attachment
from nmlightning.weights.steering.choose_weights import has_weights

if TYPE_CHECKING:
    import pytorch_lightning as pl


class SteeredRun:
    """Attaches a rule where a Trainer's optimizers have weights for it, and tells it the moment.

    Args:
        rule: what steers.
        trainer: whose fit has started.
        module: what it trains.
        other_run: follow also the recording of another seed or number of processes.

    Raises:
        InputError: a reference that does not fit the model or is shorter than the run.
    """

    def __init__(
        self,
        rule: Steering,
        trainer: "pl.Trainer",
        module: "pl.LightningModule",
        *,
        other_run: bool,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._told = False
        followed = None
        if isinstance(rule, Referenced):
            rule = copy.copy(rule)
            rule.reference = followed = _load(rule.reference)
            check_same_run(followed, trainer, other_run=other_run)
        self._rule = rule
        self._clock = EpochClock(trainer, followed)
        weights = find_layer_weights(module)
        self._layouts = {weight.name: weight.layout for weight in weights}
        known = {id(weight.parameter): weight.name for weight in weights}
        self._named = [(known.get(id(q), name), q) for name, q in module.named_parameters()]
        self.attachments = [self._attach(optimizer) for optimizer in self._steered_optimizers()]

    def begin_batch(self, batch: int) -> None:
        """Note how far the epoch is."""
        self._clock.begin_batch(batch)

    def before_step(self, optimizer: Optimizer) -> None:
        """Note a step, and measure the gradients before they are clipped."""
        self._clock.attempt(optimizer)
        for attachment in self.attachments:
            attachment.measure()

    def tell_scope(self, *, at_last: bool = False) -> None:
        """Say once what is steered, when all weights are measured or `at_last`."""
        measured = all(attachment.measured for attachment in self.attachments)
        if not self._told and (measured or at_last):
            self._told = True
            print_scope(self._rule, self.attachments, self._module, self._trainer.optimizers)

    def remove(self) -> None:
        """Let the optimizers step freely again."""
        for attachment in self.attachments:
            attachment.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs to go on bit for bit."""
        return {
            "clock": self._clock.state_dict(),
            "attachments": [attachment.state_dict() for attachment in self.attachments],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._clock.load_state_dict(state["clock"])
        for attachment, kept in zip(self.attachments, state["attachments"], strict=False):
            attachment.load_state_dict(kept)

    def _steered_optimizers(self) -> list[Optimizer]:
        choice = self._rule.include, self._rule.exclude, self._rule.least_dims
        optimizers = self._trainer.optimizers
        return [o for o in optimizers if has_weights(o, self._named, *choice)] or optimizers

    def _attach(self, optimizer: Optimizer) -> Attachment:
        attachment = self._rule.attach(optimizer, self._named, self._layouts)
        attachment.clock = lambda: {"epoch": self._clock.moment(optimizer)}
        return attachment


def _load(reference: NormHistory | str | Path) -> NormHistory:
    if isinstance(reference, NormHistory):
        return reference
    return NormHistory.load(find_recording(Path(reference), global_seed()))
