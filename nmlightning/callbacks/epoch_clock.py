"""EpochClock: the position of a run in its epochs, in attempted steps of an optimizer."""

import math
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from nmlightning.compat import in_added_epoch
from nmlightning.errors import InputError
from nmlightning.weights.history import NormHistory

if TYPE_CHECKING:
    import pytorch_lightning as pl


_SHORTLY = 1e-9  # before an epoch's end, in epochs


def steps_per_epoch(trainer: "pl.Trainer") -> int | None:
    """Return how many steps the Trainer attempts in an epoch, None where only the epoch shows it.

    It does not know that of data without a length, nor of modules that step by hand.
    """
    batches = trainer.num_training_batches
    if not trainer.lightning_module.automatic_optimization or not math.isfinite(batches):
        return None
    return math.ceil(batches / trainer.accumulate_grad_batches)


class EpochClock:
    """Gives the moment of each optimizer's step: the epoch and the part of it that is over.

        moment = epoch + attempted steps in it / steps in an epoch

    So a run with as many steps per epoch as another one has the same moments, and one with other
    batch sizes is mapped by its share of the epoch. Where the Trainer does not know the steps of an
    epoch, those of the epoch before count; in the first epoch, for a module that steps by
    hand, the share of its batches, and for data without a length the steps of `followed`, the
    recording.
    """

    def __init__(self, trainer: "pl.Trainer", followed: NormHistory | None = None) -> None:
        self._trainer = trainer
        self._followed = followed
        self._epoch = -1
        self._batch = 0
        self._attempts = [0] * len(trainer.optimizers)
        self._last_epoch = list(self._attempts)
        self._next_batch = list(self._attempts)  # the first one that counts for the next step
        self._begins = list(self._attempts)

    def begin_batch(self, batch: int) -> None:
        """Note the number of a batch in the epoch."""
        self._batch = batch
        if self._trainer.current_epoch != self._epoch:
            self._epoch = self._trainer.current_epoch
            self._last_epoch = self._attempts
            self._attempts = [0] * len(self._attempts)
            self._next_batch = list(self._attempts)

    def attempt(self, optimizer: Optimizer) -> None:
        """Count a step that is about to be taken."""
        number = self._trainer.optimizers.index(optimizer)
        self._attempts[number] += 1
        self._begins[number] = min(self._next_batch[number], self._batch)
        self._next_batch[number] = self._batch + 1

    def moment(self, optimizer: Optimizer) -> float:
        """Return the moment before the step that was counted last."""
        epoch = self._trainer.current_epoch
        if in_added_epoch(self._trainer):
            return epoch - _SHORTLY
        over, total = self._progress(self._trainer.optimizers.index(optimizer))
        return epoch + min(over / total, 1 - _SHORTLY)

    def state_dict(self) -> dict[str, Any]:
        """Return the steps that a resumed run does not see."""
        return {
            "epoch": self._epoch,
            "attempts": list(self._attempts),
            "last_epoch": list(self._last_epoch),
            "next_batch": list(self._next_batch),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from there."""
        self._epoch = state["epoch"]
        self._attempts = list(state["attempts"])
        self._last_epoch = list(state["last_epoch"])
        self._next_batch = list(state["next_batch"])

    def _progress(self, number: int) -> tuple[int, int]:
        """Return how many steps of the epoch are over, of how many."""
        batches, known = self._trainer.num_training_batches, steps_per_epoch(self._trainer)
        if known is not None:
            return self._batch // self._trainer.accumulate_grad_batches, known
        if self._last_epoch[number]:
            return self._attempts[number] - 1, self._last_epoch[number]
        if math.isfinite(batches):
            return self._begins[number], int(batches)
        return sum(self._attempts) - 1, self._recorded_steps(sum(self._attempts))

    def _recorded_steps(self, attempts: int) -> int:
        epoch = self._trainer.current_epoch
        steps = attempts if self._followed is None else self._followed.clock.length_of(epoch)
        if attempts > steps:
            raise InputError(
                f"The recording has {steps} steps in epoch {epoch}, and this run, whose data has "
                "no length, continues: record a longer run, or set limit_train_batches."
            )
        return steps
