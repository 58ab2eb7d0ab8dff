"""NormHistory: the weight norms that a run recorded, in memory and on disk. It needs no torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nmlightning.errors import InputError, check_choice, nearest
from nmlightning.name_patterns import some
from nmlightning.weights.official_pickle import read_official_pickle
from nmlightning.weights.recording_file import FILE_NAME, read_recording, write_recording

Alignment = Literal["official", "interpolate"]


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
        provenance: what made it: seed, world size, optimizer, config, versions; plain data.

    Example:
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
    ) -> "NormHistory":
        """Return the history of these arrays; their shapes and meaning are those of the attributes.

        Raises:
            InputError: shapes that do not fit together, a clock that runs backwards, a norm that
                is negative.
        """
        unknown = np.full((len(steps), len(norms)), np.nan)
        history = cls(
            {name: np.asarray(values, dtype=np.float32) for name, values in norms.items()},
            np.asarray(steps, dtype=np.int64),
            np.asarray(epochs, dtype=np.int64),
            unknown if learning_rates is None else np.asarray(learning_rates, dtype=np.float64),
            unknown if weight_decays is None else np.asarray(weight_decays, dtype=np.float64),
            dict(provenance or {}),
        )
        problem = next(_problems(history), None)
        if problem:
            raise InputError(f"This is no history of weight norms: {problem}.")
        return history

    @classmethod
    def load(cls, path: str | Path, *, finite: bool = True) -> "NormHistory":
        """Return the history in a file, or in the folder of a run.

        Args:
            path: a `weight_norms.safetensors`, or the folder that holds one.
            finite: refuse norms that are NaN or infinite, as in a run that diverged.

        Raises:
            InputError: no such file; one that is truncated, of another format or version, or whose
                arrays do not fit together; norms that are not finite.
        """
        file = Path(path)
        file = file / FILE_NAME if file.is_dir() else file
        history = cls(**read_recording(file))
        _check_usable(history, file, finite=finite)
        return history

    @classmethod
    def from_official_pickle(
        cls, path: str | Path, names: Mapping[int, str], *, steps_per_epoch: int
    ) -> "NormHistory":
        """Return the history in a `*.conv_norms.pkl` that the authors' own code has written.

        Its records are those of the ends of epochs; learning rates and decays are unknown. The
        pickle is read as data: nothing that it names is imported or run, and pandas is not needed.

        Args:
            path: the file.
            names: the names of the recorded weights in this model, by the index that each has in
                the authors' `list(net.parameters())`; names of other indices are not used.
            steps_per_epoch: the optimizer steps in an epoch of that run: 391 for CIFAR-10 in
                batches of 128, the authors' default.

        Raises:
            InputError: no such file; one that is truncated, names what is not part of such a
                recording, or has another structure; an index without a name; norms that are
                negative or not finite.

        Example:
            Each convolution of the authors' VGG-11 has a bias and a batch norm after it, so that
            the weights' indices are 0, 4, 8 and so on, in the order of our convolutions:

            >>> from nmlightning.models.vgg import VGG
            >>> weights = [name for name, w in VGG(11).named_parameters() if w.ndim == 4]
            >>> names = {4 * i: name for i, name in enumerate(weights)}
            >>> NormHistory.from_official_pickle(path, names, steps_per_epoch=391)  # doctest: +SKIP
            NormHistory(80 records of 8 weights, steps 391 to 31280)
        """
        file = Path(path)
        history = cls(**read_official_pickle(file, names, steps_per_epoch))
        _check_usable(history, file, finite=True)
        return history

    def save(self, path: str | Path) -> None:
        """Write the file at once or not at all, so that a reader never finds half of it."""
        write_recording(Path(path), **vars(self))

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        span = f", steps {self.steps[0]} to {self.steps[-1]}" if len(self) else ""
        return f"NormHistory({len(self)} records of {len(self.norms)} weights{span})"

    def at(
        self,
        *,
        step: int | None = None,
        epoch: float | None = None,
        align: Alignment = "official",
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
        self,
        *,
        step: int | None = None,
        epoch: float | None = None,
        align: Alignment = "official",
    ) -> tuple[int, int, float]:
        """Return the records around one moment, and how far it is from the first to the second.

        Args:
            step: the moment as a number of attempted optimizer steps, or
            epoch: as epochs, from 0: 2.5 is the middle of the third one.
            align: "official" is the record at the end of the same epoch, as the authors' code
                takes it, so that an epoch sees the norms it will end with; "interpolate" is linear
                in steps between the records before and after, and the first record before it.

        Raises:
            InputError: neither or both moments, or one that the recording does not reach.
        """
        check_choice("align", align, get_args(Alignment))
        if (step is None) == (epoch is None):
            raise InputError("give either a step or an epoch.")
        if align == "official":
            record = self._end_of(self._epoch_of(step) if step is not None else int(epoch or 0))
            return record, record, 0.0
        moment = float(step) if step is not None else self._step_at(epoch or 0.0)
        above = int(np.searchsorted(self.steps, moment))
        if above == len(self):
            raise InputError(self._does_not_reach(f"step {moment:g}"))
        if above == 0 or self.steps[above] == moment:
            return above, above, 0.0
        before, after = self.steps[above - 1], self.steps[above]
        return above - 1, above, float((moment - before) / (after - before))

    def until(self, step: int) -> "NormHistory":
        """Return the records that were made after at most `step` optimizer steps."""
        return self._records(self.steps <= step)

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
                    f"The recording is of another model: it has no {name!r}."
                    f"{nearest(name, self.norms)} It holds {some(self.norms, 3)}."
                )
            recorded = self.norms[name].shape[1]
            if recorded != count:
                raise InputError(
                    f"The recording is of another model: {name} has {recorded} output channels "
                    f"there and {count} here."
                )

    def _records(self, kept: NDArray[np.bool_]) -> "NormHistory":
        return NormHistory(
            {name: values[kept] for name, values in self.norms.items()},
            self.steps[kept],
            self.epochs[kept],
            self.learning_rates[kept],
            self.weight_decays[kept],
            self.provenance,
        )

    def _epoch_of(self, step: int) -> int:
        """Return the epoch that the step after `step` others belongs to."""
        after = int(np.searchsorted(self.steps, step, side="right"))
        if after == len(self):
            raise InputError(self._does_not_reach(f"step {step}"))
        return int(self.epochs[after])

    def _end_of(self, epoch: int) -> int:
        """Return the last record of an epoch."""
        record = int(np.searchsorted(self.epochs, epoch, side="right")) - 1
        if record < 0 or self.epochs[record] != epoch:
            raise InputError(self._does_not_reach(f"epoch {epoch}"))
        return record

    def _step_at(self, epoch: float) -> float:
        """Return how many steps had been attempted at an epoch and a fraction of the next."""
        whole = int(epoch)
        if len(self) and epoch == self.epochs[-1] + 1:
            return float(self.steps[-1])
        end = float(self.steps[self._end_of(whole)])
        begin = float(self.steps[self._end_of(whole - 1)]) if whole > self.epochs[0] else 0.0
        return begin + (epoch - whole) * (end - begin)

    def _does_not_reach(self, moment: str) -> str:
        if not len(self):
            return f"The recording is empty, so it does not reach {moment}."
        return (
            f"The recording does not reach {moment}: it covers steps {self.steps[0]} to "
            f"{self.steps[-1]}, epochs {self.epochs[0]} to {self.epochs[-1]}."
        )


def _check_usable(history: NormHistory, file: Path, *, finite: bool) -> None:
    """Raise InputError for what is wrong with the history of a file."""
    problem = next(_problems(history), None) or (
        next(_not_finite(history), None) if finite else None
    )
    if problem:
        raise InputError(f"{file} cannot be used: {problem}.")


def _problems(history: NormHistory) -> Iterator[str]:
    """Yield what is wrong with the shapes and the clock."""
    records, weights = len(history.steps), len(history.norms)
    if history.steps.shape != (records,) or history.epochs.shape != (records,):
        yield f"{records} steps, but epochs of shape {history.epochs.shape}"
        return
    for name in ("learning_rates", "weight_decays"):
        shape = getattr(history, name).shape
        if shape != (records, weights):
            yield f"{name} has shape {shape}, expected {(records, weights)}"
    for name, values in history.norms.items():
        if values.ndim != 2 or values.shape[0] != records:
            yield f"{name} has shape {values.shape}, expected ({records}, channels)"
        elif (values < 0).any():
            yield f"{name} has a negative norm in record {int((values < 0).any(1).argmax())}"
    if (np.diff(history.steps) <= 0).any() or (history.steps < 0).any():
        yield "its steps do not increase"
    if (np.diff(history.epochs) < 0).any() or (history.epochs < 0).any():
        yield "its epochs run backwards"


def _not_finite(history: NormHistory) -> Iterator[str]:
    for name, values in history.norms.items():
        bad = ~np.isfinite(values)
        if bad.any():
            record = int(bad.any(1).argmax())
            yield (
                f"the norms of {name} are not finite from record {record} (epoch "
                f"{history.epochs[record]}) on, so the run it is of diverged"
            )
