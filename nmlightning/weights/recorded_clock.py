"""The clock of a recording: which of its records belong to a moment."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nmlightning.errors import InputError


@dataclass(frozen=True, eq=False)
class RecordedClock:
    """The moments of T records.

    Attributes:
        steps: (T,) int64, increasing.
        epochs: (T,) int64, never decreasing.
        steps_per_epoch: of the run; None means that its last epoch is as long as the one before.
    """

    steps: NDArray[np.int64]
    epochs: NDArray[np.int64]
    steps_per_epoch: int | None = None

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def covered(self) -> float:
        """How many epochs there are records of, 2.5 for a run that stopped inside its third."""
        if not len(self):
            return 0.0
        last = int(self.epochs[-1])
        return last + self.steps_in(last) / max(self.length_of(last), 1)

    def steps_in(self, epoch: int) -> int:
        """Return how many steps of an epoch are recorded."""
        return int(self.steps[self.end_of(epoch)]) - self._begin(epoch)

    def length_of(self, epoch: int) -> int:
        """Return how many steps an epoch has, of the last one also those after the last record."""
        recorded = self.steps_in(epoch)
        if epoch < self.epochs[-1]:
            return recorded
        if self.steps_per_epoch is not None:
            return max(recorded, self.steps_per_epoch)
        first = int(np.searchsorted(self.epochs, epoch))
        return max(recorded, self.steps_in(int(self.epochs[first - 1])) if first else 0)

    def epoch_of(self, step: int) -> int:
        """Return the epoch that the step after `step` others belongs to."""
        after = int(np.searchsorted(self.steps, step, side="right"))
        if after == len(self):
            raise self.does_not_reach(f"step {step}")
        return int(self.epochs[after])

    def end_of(self, epoch: int) -> int:
        """Return the last record of an epoch."""
        record = int(np.searchsorted(self.epochs, epoch, side="right")) - 1
        if record < 0 or self.epochs[record] != epoch:
            raise self.does_not_reach(f"epoch {epoch}")
        return record

    def around(self, step: float) -> tuple[int, int, float]:
        """Return the records before and after a moment, and how far it is between them."""
        above = int(np.searchsorted(self.steps, step))
        if above == len(self):
            raise self.does_not_reach(f"step {step:g}")
        if above == 0 or self.steps[above] == step:
            return above, above, 0.0
        before, after = self.steps[above - 1], self.steps[above]
        return above - 1, above, float((step - before) / (after - before))

    def step_at(self, epoch: float) -> float:
        """Return how many steps had been attempted at an epoch and a fraction of the next."""
        whole = int(epoch)
        if len(self) and epoch == self.epochs[-1] + 1:
            whole -= 1
        self.end_of(whole)
        return self._begin(whole) + (epoch - whole) * self.length_of(whole)

    def does_not_reach(self, moment: str) -> InputError:
        """Return the error for a moment that there are no records of."""
        if not len(self):
            return InputError(f"The recording is empty, so it does not reach {moment}.")
        return InputError(
            f"The recording does not reach {moment}: it covers steps {self.steps[0]} to "
            f"{self.steps[-1]}, epochs {self.epochs[0]} to {self.epochs[-1]}."
        )

    def _begin(self, epoch: int) -> int:
        """Return how many steps had been attempted before an epoch."""
        first = int(np.searchsorted(self.epochs, epoch))
        if first:
            return int(self.steps[first - 1])
        return int(self.steps[0]) if epoch else 0
