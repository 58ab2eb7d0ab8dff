"""Put a rule to work on a Trainer's optimizers, from the start or from a checkpoint on."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmlightning.callbacks.followed_optimizer import check_same_optimizer
from nmlightning.callbacks.provenance import check_same_run
from nmlightning.compat import global_seed
from nmlightning.errors import InputError
from nmlightning.weights.history import NormHistory
from nmlightning.weights.recording_file import find_recording
from nmlightning.weights.steering import Steering
from nmlightning.weights.steering.attachment import Attachment
from nmlightning.weights.steering.choose_weights import has_weights

if TYPE_CHECKING:
    import pytorch_lightning as pl

States = Sequence[Mapping[str, Any]]


def check_steering(steering: object) -> None:
    """Raise InputError for anything but a rule, or None."""
    if steering is not None and not callable(getattr(steering, "attach", None)):
        raise InputError(f"steering is a rule, such as LRCorrection(…), or None, got {steering!r}.")


def attach_steering(
    trainer: "pl.Trainer",
    pl_module: "pl.LightningModule",
    steering: Steering,
    *,
    other_run: bool,
) -> list[Attachment]:
    """Steer each optimizer that has a weight to steer.

    Raises:
        InputError: a reference that does not fit the model, or, unless `other_run`, is of another
            kind of run; whatever the rule's `attach` refuses.
    """
    steered = [
        optimizer
        for optimizer in trainer.optimizers
        if has_weights(optimizer, pl_module, steering.include, steering.exclude)
    ]
    optimizers = steered or trainer.optimizers
    reference = getattr(steering, "reference", None)
    if reference is not None:
        history = _load(reference)
        check_same_run(history, trainer, other_run=other_run)
        steering = copy.copy(steering)
        steering.reference = history  # type: ignore[union-attr]
    attachments = [steering.attach(optimizer, pl_module) for optimizer in optimizers]
    if reference is not None and not other_run:
        names = [rule.weight.name for each in attachments for rule in each.rules]
        check_same_optimizer(history, names, optimizers)
    return attachments


def resume_steering(attachments: Sequence[Attachment], states: States, step: int) -> None:
    """Go on with the steering of a checkpoint, of `step` optimizer steps.

    Where one of both runs is not steered, a warning says so.

    Raises:
        InputError: the checkpoint was steered otherwise.
    """
    if states and not attachments:
        warnings.warn(
            f"The checkpoint was steered by {states[0]['rule']}, and this run is not steered.",
            stacklevel=2,
        )
    elif attachments and not states:
        warnings.warn(
            f"The checkpoint was not steered; {attachments[0].name} steers this run from step "
            f"{step} on.",
            stacklevel=2,
        )
    elif len(attachments) != len(states):
        raise InputError(
            f"The checkpoint was steered in {len(states)} optimizers, and this run is in "
            f"{len(attachments)}: go on with the same, or start from the weights alone."
        )
    for attachment, state in zip(attachments, states, strict=False):
        attachment.load_state_dict(state)


def _load(reference: NormHistory | str | Path) -> NormHistory:
    if isinstance(reference, NormHistory):
        return reference
    return NormHistory.load(find_recording(Path(reference), global_seed()))
