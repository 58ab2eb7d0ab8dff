"""NormHistory: the weight norms that a run recorded, in memory and on disk. It needs no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nmlightning.errors import InputError, check_choice, check_whole_number, nearest
from nmlightning.name_patterns import some
from nmlightning.weights import recording_file

Moment = Mapping[str, float]
"""`{"step": …}` or `{"epoch": …}`, as `NormHistory.place` takes it."""
Alignment = Literal["official", "interpolate"]
RecordPlace = tuple[int, int, float]
"""The records before and after a moment, and how far it is from the first to the second."""


@dataclass(frozen=True, eq=False)
class RecordedClock:
    """The moments of T records."""

    steps: NDArray[np.int64]  # (T,) int64, increasing
    epochs: NDArray[np.int64]  # (T,) int64, never decreasing
    # Of the run; None means that its last epoch is as long as the one before.
    steps_per_epoch: int | None = None

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def covered(self) -> float:
        """The number of epochs with records, 2.5 for a run that stopped inside its third."""
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

    def place(self, step: int | None, epoch: float | None, align: Alignment) -> RecordPlace:
        """Return `NormHistory.place` of a moment that needs no check."""
        if align == "official":
            record = self.end_of(self.epoch_of(step) if step is not None else int(epoch or 0))
            return record, record, 0.0
        return self.around(float(step) if step is not None else self.step_at(epoch or 0.0))

    def around(self, step: float) -> RecordPlace:
        """Return the records around a moment in steps."""
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


@dataclass(frozen=True, eq=False)
class NormHistory:
    """T records of the norms of L weights, with the clock, the rates and where they come from.

    A record holds the number of optimizer steps that were attempted before it and the epoch, from
    0, that it was made in; the last record of an epoch is that of its end.

    Attributes:
        norms: (T, C) float32 ‖w_i‖ of each weight's C output channels, by the weight's name.
        steps: (T,) int64, increasing.
        epochs: (T,) int64, never decreasing.
        learning_rates: (T, L) float64, weights in the order of `norms`; NaN where unknown.
        weight_decays: (T, L) float64, the same.
        provenance: what made it: seed, world size, optimizer, config, versions, steps per epoch;
            plain data.
        quantities: (T, L) float32 of what else was recorded of each weight, such as `rotation`, by
            name; NaN where a step was not measured.

    Examples:
        >>> history = NormHistory.from_arrays({"conv.weight": [[3.0], [1.0]]}, [10, 20], [0, 1])
        >>> history.at(epoch=1)["conv.weight"]
        array([1.], dtype=float32)
    """

    norms: Mapping[str, NDArray[np.float32]]
    steps: NDArray[np.int64]
    epochs: NDArray[np.int64]
    learning_rates: NDArray[np.float64]
    weight_decays: NDArray[np.float64]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    quantities: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    @classmethod
    def from_arrays(
        cls,
        norms: Mapping[str, ArrayLike],
        steps: Sequence[int] | NDArray[np.int64],
        epochs: Sequence[int] | NDArray[np.int64],
        *,
        learning_rates: ArrayLike | None = None,
        weight_decays: ArrayLike | None = None,
        provenance: Mapping[str, Any] | None = None,
        quantities: Mapping[str, ArrayLike] | None = None,
    ) -> "NormHistory":
        """Return the history of these arrays; their shapes and meaning are those of the attributes.

        Raises:
            InputError: what is no array of numbers; shapes that do not fit together, a clock that
                runs backwards or has parts of steps, a norm that is negative; provenance that is
                no plain data.
        """
        rates, origin = (learning_rates, weight_decays), {} if provenance is None else provenance
        more = quantities or {}
        try:
            arrays = recording_file.make_arrays(
                norms, steps, epochs, *rates, provenance=origin, quantities=more
            )
            return cls(**arrays)
        except InputError as error:
            raise InputError(f"This is not a history of weight norms: {error}.") from None

    @classmethod
    def load(cls, path: str | Path, *, finite: bool = True) -> "NormHistory":
        """Return the history in a file, or in the folder of a run.

        Args:
            path: a `weight_norms.safetensors`, or the folder that holds one.
            finite: refuse norms that are NaN or infinite, as in a run that diverged.

        Raises:
            InputError: no such file; one that is a pickle, truncated, of another format or
                version, or whose arrays do not fit together; norms that are not finite.
        """
        file = Path(path)
        if file.suffix == ".pkl":
            raise InputError(
                f"{file} is a pickle, which may run anything when it is read: read it where it was "
                'written and use NormHistory.from_arrays, as "A pickle of norms" in '
                "docs/weight_norms.md shows."
            )
        with recording_file.explain_unreadable(file):
            file = file / recording_file.FILE_NAME if file.is_dir() else file
            content = recording_file.read_recording(file)
        try:
            arrays = recording_file.make_arrays(**content)
            if finite:
                recording_file.check_finite(arrays["norms"], arrays["epochs"])
        except InputError as error:
            raise InputError(f"{file} cannot be used: {error}.") from None
        return cls(**arrays)

    @property
    def clock(self) -> RecordedClock:
        known = self.provenance.get("steps_per_epoch")
        return RecordedClock(self.steps, self.epochs, known if type(known) is int else None)

    def save(self, path: str | Path) -> None:
        """Write the file at once or not at all, so that a reader never finds half of it."""
        recording_file.write_recording(Path(path), **vars(self))

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        span = f", steps {self.steps[0]} to {self.steps[-1]}" if len(self) else ""
        return f"NormHistory({len(self)} records of {len(self.norms)} weights{span})"

    def at(
        self, *, step: int | None = None, epoch: float | None = None, align: Alignment = "official"
    ) -> dict[str, NDArray[np.float32]]:
        """Return the (C,) norms of each weight at one moment; see `place` for the arguments."""
        below, above, share = self.place(step=step, epoch=epoch, align=align)
        return {
            name: values[below] + np.float32(share) * (values[above] - values[below])
            if share
            else values[below]
            for name, values in self.norms.items()
        }

    def place(
        self, *, step: int | None = None, epoch: float | None = None, align: Alignment = "official"
    ) -> RecordPlace:
        """Return the records around one moment, and how far it is from the first to the second.

        Args:
            step: the moment as a number of attempted optimizer steps, or
            epoch: as epochs, from 0: 2.5 is the middle of the third one.
            align: "official" is the record at the end of the same epoch, as the authors' code
                takes it, so that an epoch sees the norms it will end with; "interpolate" is linear
                in steps between the records before and after, and the first record before it.

        Raises:
            InputError: neither or both moments, one that is negative or no number, or one that
                the recording does not reach.
        """
        check_choice("align", align, get_args(Alignment))
        if (step is None) == (epoch is None):
            raise InputError("give either a step or an epoch.")
        if step is not None:
            check_whole_number("step", step, least=0)
        elif not (isinstance(epoch, Real) and 0 <= epoch < math.inf):
            raise InputError(f"epoch is a finite number of at least 0, got {epoch!r}.")
        return self.clock.place(step, epoch, align)

    def until(self, step: int) -> "NormHistory":
        """Return the records that were made after at most `step` optimizer steps."""
        return self._records(slice(int(np.searchsorted(self.steps, step, side="right"))))

    def epoch_ends(self) -> "NormHistory":
        """Return the last record of each epoch."""
        last = np.append(np.diff(self.epochs) > 0, True)[: len(self)]
        return self._records(last)

    def check_weights(self, channels: Mapping[str, int]) -> None:
        """Raise InputError, naming the first difference, unless it holds all these weights.

        Args:
            channels: the number of output channels of each weight, by name.
        """
        for name, count in channels.items():
            if name not in self.norms:
                raise InputError(
                    f"The recording is from another model: it has no {name!r}."
                    f"{nearest(name, self.norms)} It holds {some(self.norms, 3)}."
                )
            recorded = self.norms[name].shape[1]
            if recorded != count:
                raise InputError(
                    f"The recording is from another model: {name} has {recorded} output channels "
                    f"there and {count} here."
                )

    def _records(self, kept: NDArray[np.bool_] | slice) -> "NormHistory":
        return NormHistory(
            {name: values[kept] for name, values in self.norms.items()},
            self.steps[kept],
            self.epochs[kept],
            self.learning_rates[kept],
            self.weight_decays[kept],
            self.provenance,
            {name: values[kept] for name, values in self.quantities.items()},
        )
