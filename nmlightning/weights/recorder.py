"""Records the norms of weights during a run, on its device, and keeps them in a file."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nmlightning.weights.history import NormHistory
from nmlightning.weights.layer_weights import LayerWeight
from nmlightning.weights.recording_file import FILE_NAME

Rates = Mapping[int, tuple[float, float]]
"""Learning rate and weight decay by the id of a parameter."""


class Recorder:
    """Takes records of the norms of some weights, and brings them to the CPU when they are saved.

    Args:
        weights: what is recorded.
        provenance: what the recording is of; plain data.
        earlier: the records of the run that this one resumes.

    Attributes:
        weights: the same list.
    """

    def __init__(
        self,
        weights: Sequence[LayerWeight],
        provenance: Mapping[str, Any],
        earlier: NormHistory | None = None,
    ) -> None:
        self.weights = list(weights)
        self._provenance = {**provenance, "finished": False}
        self._clock: list[tuple[int, int]] = []
        self._rates: list[NDArray[np.float64]] = []
        self._pending: list[Tensor] = []
        self._norms: list[NDArray[np.float32]] = []
        if earlier is not None:
            self._take_over(earlier)

    @property
    def last_step(self) -> int:
        """The step of the latest record, or -1."""
        return self._clock[-1][0] if self._clock else -1

    def record(self, step: int, epoch: int, rates: Rates) -> None:
        """Record the norms as they are now, after `step` attempted steps, within `epoch`.

        Nothing waits for the device. A second record at one step is not taken.
        """
        if step == self.last_step:
            return
        self._pending.append(torch.cat([weight.norms().float() for weight in self.weights]))
        self._clock.append((step, epoch))
        unknown = (np.nan, np.nan)
        self._rates.append(np.array([rates.get(id(w.parameter), unknown) for w in self.weights]))

    def end_epoch(self) -> None:
        """Note how many steps the epoch had that is over, unlike one that a run stops inside."""
        last_step, epoch = self._clock[-1]
        begin = max((step for step, other in self._clock if other < epoch), default=0)
        self._provenance["steps_per_epoch"] = last_step - begin

    def history(self) -> NormHistory:
        """Return all records so far."""
        if self._pending:
            self._norms.append(torch.stack(self._pending).cpu().numpy())
            self._pending = []
        counts = [weight.channels for weight in self.weights]
        rows = np.concatenate([np.zeros((0, sum(counts)), np.float32), *self._norms])
        self._norms = [rows]
        columns = np.split(rows, np.cumsum(counts)[:-1], axis=1)
        rates = np.array(self._rates).reshape(len(self._rates), len(self.weights), 2)
        return NormHistory.from_arrays(
            {w.name: values for w, values in zip(self.weights, columns, strict=True)},
            [step for step, _ in self._clock],
            [epoch for _, epoch in self._clock],
            learning_rates=rates[:, :, 0],
            weight_decays=rates[:, :, 1],
            provenance=self._provenance,
        )

    def finish(self) -> None:
        """Note that these are all records of the run, unlike those of one that was stopped."""
        self._provenance["finished"] = True

    def save(self, file: Path) -> None:
        """Write all records so far."""
        self.history().save(file)

    def _take_over(self, earlier: NormHistory) -> None:
        earlier.check_weights({weight.name: weight.channels for weight in self.weights})
        names = list(earlier.norms)
        order = [names.index(weight.name) for weight in self.weights]
        self._norms = [np.concatenate([earlier.norms[w.name] for w in self.weights], axis=1)]
        self._clock = list(zip(earlier.steps.tolist(), earlier.epochs.tolist(), strict=True))
        both = np.stack([earlier.learning_rates, earlier.weight_decays], axis=2)
        self._rates = list(both[:, order])


@dataclass(frozen=True)
class KeptRecording:
    """The file in which a run keeps its records.

    Attributes:
        file: nothing but this run is in it.
        run: a name that a run and those that resume it share, and no other.
    """

    file: Path
    run: str

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return what a run needs that resumes from the record at `step`."""
        return {"file": str(self.file.absolute()), "run": self.run, "step": step}


def keep_recording(
    folder: Path, state: Mapping[str, Any], taken: Collection[Path | None] = ()
) -> tuple[KeptRecording, NormHistory | None]:
    """Return where a run in `folder` keeps its records, and those it continues.

    A run continues its own file if that is in this folder; what it recorded there after the
    checkpoint is then replaced. Every other run gets a name that nothing has yet.

    Args:
        folder: of the run.
        state: of the run that it resumes, by `state_dict`; empty for a new one.
        taken: files that others are about to write.
    """
    file = _file_of(folder, state) if state else None
    if file is None:
        return KeptRecording(_free_file(folder, taken), uuid4().hex), None
    earlier = NormHistory.load(file, finite=False).until(int(state["step"]))
    at_home = file.parent.resolve() == folder.resolve()
    return KeptRecording(file if at_home else _free_file(folder, taken), state["run"]), earlier


def _file_of(folder: Path, state: Mapping[str, Any]) -> Path | None:
    """Return the file of a run, also from a folder that was moved."""
    noted = Path(state["file"])
    for file in filter(Path.is_file, (noted, folder / noted.name)):
        if NormHistory.load(file, finite=False).provenance.get("run") == state["run"]:
            return file
    warnings.warn(
        f"The recording that the checkpoint continues is gone: {noted}. The new one "
        f"starts at step {state['step']}.",
        stacklevel=2,
    )
    return None


def _free_file(folder: Path, taken: Collection[Path | None]) -> Path:
    """Return a file name in `folder` that nothing has yet, nor will have."""
    stem, suffix = FILE_NAME.split(".")
    names = (FILE_NAME, *(f"{stem}-v{version}.{suffix}" for version in range(1, 10_000)))
    files = (folder / name for name in names)
    return next(file for file in files if file not in taken and not file.exists())
