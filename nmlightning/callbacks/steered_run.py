"""A rule at work on the optimizers of a Trainer, for one fit."""

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from nmlightning.callbacks.epoch_clock import EpochClock
from nmlightning.callbacks.followed_optimizer import check_same_optimizer
from nmlightning.callbacks.print_scope import print_scope
from nmlightning.callbacks.provenance import check_same_run
from nmlightning.compat import global_seed
from nmlightning.errors import InputError
from nmlightning.weights.history import NormHistory
from nmlightning.weights.recording_file import find_recording
from nmlightning.weights.steering import FollowingRule, NormSchedule, Steering
from nmlightning.weights.steering.attachment import Attachment
from nmlightning.weights.steering.choose_weights import has_weights
from nmlightning.weights.weight_norm import WeightNorm

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
        _check_projection(rule, module)
        if isinstance(rule, FollowingRule):
            rule = copy.copy(rule)
            rule.reference = followed = _load(rule.reference)
            check_same_run(followed, trainer, other_run=other_run)
        self._rule = rule
        self._clock = EpochClock(trainer, followed)
        self.attachments = [self._attach(optimizer) for optimizer in self._steered_optimizers()]
        if followed is not None and not other_run:
            names = [rule.weight.name for each in self.attachments for rule in each.rules]
            check_same_optimizer(followed, names, self._steered_optimizers())

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

    def look(self) -> None:
        """Warn of steps that were undone."""
        for attachment in self.attachments:
            attachment.look()

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
        kept = state["attachments"]
        if len(self.attachments) != len(kept):
            raise InputError(
                f"The checkpoint was steered in {len(kept)} optimizers, and this run is in "
                f"{len(self.attachments)}: go on with the same, or start from the weights alone."
            )
        self._clock.load_state_dict(state["clock"])
        for attachment, each in zip(self.attachments, kept, strict=True):
            attachment.load_state_dict(each)

    def _steered_optimizers(self) -> list[Optimizer]:
        choice = self._rule.include, self._rule.exclude, self._rule.least_dims
        optimizers = self._trainer.optimizers
        return [o for o in optimizers if has_weights(o, self._module, *choice)] or optimizers

    def _attach(self, optimizer: Optimizer) -> Attachment:
        attachment = self._rule.attach(optimizer, self._module)
        attachment.clock = lambda: {"epoch": self._clock.moment(optimizer)}
        return attachment


def _check_projection(rule: Steering, module: "pl.LightningModule") -> None:
    projected = any(isinstance(m, WeightNorm) and m.settings.project for m in module.modules())
    if projected and isinstance(rule, NormSchedule):
        raise InputError(
            "NormSchedule sets the norms that project=True sets, too: normalise the weights "
            "without it."
        )


def check_steering(steering: object) -> None:
    """Raise InputError for anything but a rule, or None."""
    if not isinstance(steering, Steering | None):
        raise InputError(f"steering is a rule, such as LRCorrection(…), or None, got {steering!r}.")


def resume_steering(steered: SteeredRun | None, state: Mapping[str, Any] | None, step: int) -> None:
    """Go on with the steering of a checkpoint, of `step` optimizer steps.

    Where one of both runs is not steered, a warning says so.

    Raises:
        InputError: the checkpoint was steered otherwise.
    """
    if steered is not None and state is not None:
        steered.load_state_dict(state)
    elif state is not None:
        rule = state["attachments"][0]["rule"]
        warnings.warn(
            f"The checkpoint was steered by {rule}, and this run is not steered.", stacklevel=2
        )
    elif steered is not None and step > 0:
        warnings.warn(
            f"The checkpoint was not steered; {steered.attachments[0].name} steers this run from "
            f"step {step} on.",
            stacklevel=2,
        )


def _load(reference: NormHistory | str | Path) -> NormHistory:
    if isinstance(reference, NormHistory):
        return reference
    return NormHistory.load(find_recording(Path(reference), global_seed()))
