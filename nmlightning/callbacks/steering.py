"""A rule on the optimizers of a Trainer for one fit, and the table of what it works on."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import Optimizer

from nmlightning.callbacks.epoch_clock import EpochClock
from nmlightning.callbacks.provenance import check_same_run
from nmlightning.compat import global_seed
from nmlightning.errors import InputError
from nmlightning.name_patterns import some
from nmlightning.optim import FollowingRule, NormSchedule, Steering
from nmlightning.optim.families import group_numbers
from nmlightning.optim.parameters import NamedWeights
from nmlightning.optim.scope import has_weights, why_left
from nmlightning.optim.step_hooks import Attachment
from nmlightning.parametrizations import WeightNorm
from nmlightning.weights.history import NormHistory
from nmlightning.weights.recording_file import find_recording

if TYPE_CHECKING:
    import pytorch_lightning as pl


def check_same_optimizer(
    history: NormHistory, names: Sequence[str], optimizers: Sequence[Optimizer]
) -> None:
    """Compare optimizers, learning rates and decays with those of a recording, where it has them.

    A warning tells of another learning rate, and of a recording without weight decay.

    Args:
        history: the recording.
        names: of the weights that follow it.
        optimizers: that have these weights.

    Raises:
        InputError: an optimizer of a class that the recorded run did not have.
    """
    recorded = history.provenance.get("optimizers") or []
    for optimizer in optimizers:
        _check_class(recorded, optimizer)
        _compare_rates(recorded, optimizer)
    columns = [list(history.norms).index(name) for name in names]
    decays = history.weight_decays[:, columns]
    if decays.size and not np.isnan(decays).any() and not decays.any():
        _warn(f"without weight decay on {some(names, 3)}, so there is none to replace")


def _check_class(recorded: Sequence[Mapping[str, Any]], optimizer: Optimizer) -> None:
    there, here = [each.get("name") for each in recorded], type(optimizer).__name__
    if there and here not in there:
        raise InputError(
            f"The recording is of a run with {' and '.join(map(str, there))}, and this one has "
            f"{here}, whose steps follow norms otherwise; set other_run to follow it all the same."
        )


def _compare_rates(recorded: Sequence[Mapping[str, Any]], optimizer: Optimizer) -> None:
    name, here = type(optimizer).__name__, float(optimizer.defaults["lr"])
    there = [each["lr"] for each in recorded if each.get("name") == name and "lr" in each]
    if there and here not in there:
        _warn(f"with learning rate {there[0]:g}, and this one has {here:g}")


def _warn(difference: str) -> None:
    warnings.warn(
        f"The recording is of a run {difference}; set other_run if that is meant.", stacklevel=2
    )


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
