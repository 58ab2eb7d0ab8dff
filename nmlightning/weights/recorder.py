"""Records the norms of weights during a run, on its device, and keeps them in a file."""

import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from nmlightning.errors import InputError
from nmlightning.weights.channel_norms import Kernels, join_norms, local_norms
from nmlightning.weights.history import NormHistory
from nmlightning.weights.layer_weights import LayerWeight
from nmlightning.weights.recording_file import (
    FILE_NAME,
    GrowingRecording,
    read_recording,
    record_type,
    split_records,
)

Rates = Mapping[int, tuple[float, float]]
"""Learning rate and weight decay by the id of a parameter."""
_MOST_PENDING = 256  # records that wait on the device


def rates_of(optimizer: Optimizer) -> dict[int, tuple[float, float]]:
    """Return the `Rates` of an optimizer's next step, which a scheduler may change after it."""
    rates: dict[int, tuple[float, float]] = {}
    for group in optimizer.param_groups:
        now = float(group["lr"]), float(group.get("weight_decay", 0.0))
        rates.update((id(parameter), now) for parameter in group["params"])
    return rates


class Recorder:
    """Takes records of the norms of weights, and brings them to the CPU when they are saved."""

    def __init__(
        self,
        weights: Sequence[LayerWeight],
        provenance: Mapping[str, Any],
        earlier: NormHistory | None = None,
        kernels: Kernels | None = None,
        quantities: Sequence[str] = (),  # a number of each weight each, recorded with the norms
    ) -> None:
        self.weights = list(weights)
        self.kernels = kernels
        self.quantities = tuple(quantities)
        self._channels = {weight.name: weight.channels for weight in self.weights}
        self._type = record_type(list(self._channels.values()), self.quantities)
        self._provenance = {**provenance, "finished": False}
        self.resume(earlier)

    def resume(self, earlier: NormHistory | None, run: str | None = None) -> None:
        """Drop all records, and continue earlier ones, of the run of that name."""
        self._provenance |= {"run": run} if run else {}
        self._earlier = earlier
        self._file: GrowingRecording | None = None
        self._pending: list[Tensor] = []  # on the device, and when and by which rates
        self._moments: list[tuple[int, int, NDArray[np.float64]]] = []
        self._unsaved: list[NDArray[Any]] = []
        # The last record of each epoch by its number, and the first of all as -1.
        self._ends: dict[int, NDArray[Any]] = {}
        self.last_step = -1  # of the latest record
        if earlier is not None and len(earlier):
            earlier.check_weights(self._channels)
            self.last_step = int(earlier.steps[-1])
            self._note_ends(next(self._records_of(earlier, 1)))
            self._note_ends(next(self._records_of(earlier.epoch_ends(), len(earlier))))

    def record(
        self,
        step: int,
        epoch: int,
        rates: Rates,
        values: Mapping[str, Tensor] | None = None,
        norms: Sequence[Tensor] | None = None,
    ) -> None:
        """Record the norms as they are now, after `step` attempted steps, within `epoch`.

        They are computed unless they are given. The device is waited for once in 256 records. A
        second record at one step is not taken. The `values` are of the recorder's quantities, (L,)
        each; those that are not there are NaN.
        """
        if step == self.last_step:
            return
        now_held = self.norms() if norms is None else norms
        flat = torch.cat([each.float() for each in now_held])
        unknown = flat.new_full((len(self.weights),), math.nan)
        known = values or {}
        columns = [known.get(name, unknown).float() for name in self.quantities]
        self._pending.append(torch.cat([flat, *columns]))
        unset = (np.nan, np.nan)
        now = np.array([rates.get(id(w.parameter), unset) for w in self.weights])
        self._moments.append((step, epoch, now))
        self.last_step = step
        if len(self._pending) >= _MOST_PENDING:
            self._collect()

    @torch.no_grad()
    def norms(self, local: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Return the (C,) norms of each weight as they are now, of all ranks, which have to ask.

        The `local_norms` of those that are not computed may be known.
        """
        held = [weight for weight in self.weights if weight.computed is None]
        parameters, layouts = [w.parameter for w in held], [w.layout for w in held]
        local = local or local_norms(parameters, layouts, self.kernels)
        known = iter(join_norms(local, parameters, layouts))
        return [next(known) if w.computed is None else w.norms() for w in self.weights]

    def end_epoch(self) -> None:
        """Note how many steps the epoch had that is over, unlike one that a run stops inside."""
        self._collect()
        *_, epoch = self._ends
        before = [record for other, record in self._ends.items() if 0 <= other < epoch]
        begin = int(before[-1]["step"][0]) if before else 0
        self._provenance["steps_per_epoch"] = self.last_step - begin

    def norms_by_epoch(self) -> Mapping[str, NDArray[np.float32]]:
        """Return each weight's norms (1 + T, C), of the first record and the last of T epochs."""
        self._collect()
        norms: Mapping[str, NDArray[np.float32]]
        norms = split_records(np.concatenate([*self._ends.values()]), self._channels)["norms"]
        return norms

    def history(self) -> NormHistory:
        self._collect()
        earlier = NormHistory.load(self._file.file, finite=False) if self._file else self._earlier
        parts = list(self._records_of(earlier)) if earlier else []
        records = np.concatenate([np.zeros(0, self._type), *parts, *self._unsaved])
        content = split_records(records, self._channels, self.quantities)
        return NormHistory.from_arrays(provenance=self._provenance, **content)

    def finish(self) -> None:
        """Note that these are all records of the run, unlike those of one that was stopped."""
        self._provenance["finished"] = True

    def forget(self) -> None:
        """Drop the records, on a process that saves none."""
        self._collect()
        self._unsaved = []

    def save(self, file: Path) -> None:
        """Write the records since the last save, behind those in the file."""
        self._collect()
        unsaved = np.concatenate([np.zeros(0, self._type), *self._unsaved])
        if self._file is not None:
            self._file.append(unsaved, self._provenance)
        else:
            count = len(unsaved) + (len(self._earlier) if self._earlier else 0)
            parts = chain(self._records_of(self._earlier) if self._earlier else (), [unsaved])
            self._file = GrowingRecording(
                file, self._channels, self._provenance, count, parts, self.quantities
            )
        self._unsaved, self._earlier = [], None

    def _collect(self) -> None:
        """Bring what was recorded from the device."""
        if not self._pending:
            return
        records = np.zeros(len(self._pending), self._type)
        pending = torch.stack(self._pending).cpu().numpy()
        norms = records["norms"].shape[1]
        records["norms"] = pending[:, :norms]
        if self.quantities:
            records["quantities"] = pending[:, norms:].reshape(records["quantities"].shape)
        records["step"], records["epoch"], records["rates"] = map(
            np.array, zip(*self._moments, strict=True)
        )
        self._pending, self._moments = [], []
        self._unsaved.append(records)
        self._note_ends(records)

    def _note_ends(self, records: NDArray[Any]) -> None:
        self._ends.setdefault(-1, records[:1].copy())
        last = np.append(np.diff(records["epoch"]) > 0, True)
        self._ends |= {int(r["epoch"][0]): r for r in np.split(records[last].copy(), last.sum())}

    def _records_of(self, history: NormHistory, at_once: int = 1024) -> Iterator[NDArray[Any]]:
        """Yield the records of a history that has these weights, among others or in any order."""
        order = [list(history.norms).index(name) for name in self._channels]
        for start in range(0, len(history), at_once):
            some = slice(start, start + at_once)
            records = np.zeros(len(history.steps[some]), self._type)
            records["step"], records["epoch"] = history.steps[some], history.epochs[some]
            records["rates"][:, :, 0] = history.learning_rates[some][:, order]
            records["rates"][:, :, 1] = history.weight_decays[some][:, order]
            norms = [history.norms[name][some] for name in self._channels]
            records["norms"] = np.concatenate(norms, axis=1)
            for number, name in enumerate(self.quantities):
                known = history.quantities.get(name)
                records["quantities"][:, number] = (
                    np.nan if known is None else known[some][:, order]
                )
            yield records


@dataclass(frozen=True)
class KeptRecording:
    """The file in which a run keeps its records."""

    file: Path  # nothing but this run is in it
    run: str  # a name that a run and those that resume it share, and no other

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return what a run needs that resumes from the record at `step`."""
        return {"file": str(self.file.absolute()), "run": self.run, "step": step}


def keep_recording(
    folder: Path,
    state: Mapping[str, Any],
    taken: Collection[Path | None] = (),
    checkpoint: Path | None = None,
) -> tuple[KeptRecording, NormHistory | None]:
    """Return where a run in `folder` keeps its records, and those it continues.

    A run continues its own file if that is in this folder; what it recorded there after the
    checkpoint is then replaced. Every other run gets a name that nothing has yet, and that no other
    has `taken`. A project may have been moved, or copied, since its checkpoint.
    """
    file = _file_of(folder, state, checkpoint) if state else None
    if file is None:
        return KeptRecording(_free_file(folder, taken), uuid4().hex), None
    earlier = NormHistory.load(file, finite=False).until(int(state["step"]))
    at_home = file.parent.resolve() == folder.resolve()
    return KeptRecording(file if at_home else _free_file(folder, taken), state["run"]), earlier


def _file_of(folder: Path, state: Mapping[str, Any], checkpoint: Path | None) -> Path | None:
    """Return the file of a run, of several that nearest to the checkpoint."""
    noted = Path(state["file"])
    beside = [] if checkpoint is None else list(checkpoint.absolute().parents)[:2]
    ends = [Path(*noted.parts[-parts:]) for parts in (1, 3)]  # 3: `lightning_logs/version_N`
    moved = [place / end for place in beside for end in ends]
    for file in (*moved, noted, folder / noted.name):
        try:
            if file.is_file() and read_recording(file)["provenance"].get("run") == state["run"]:
                return file
        except InputError as error:
            warnings.warn(f"{str(error).rstrip('.')}; it is skipped.", stacklevel=2)
    warnings.warn(
        f"The recording that the checkpoint continues is gone: {noted}. The new one "
        f"starts after step {state['step']}.",
        stacklevel=2,
    )
    return None


def _free_file(folder: Path, taken: Collection[Path | None]) -> Path:
    """Return a file name in `folder` that nothing has yet, nor will have."""
    stem, suffix = FILE_NAME.split(".")
    names = (FILE_NAME, *(f"{stem}-v{version}.{suffix}" for version in range(1, 10_000)))
    files = (folder / name for name in names)
    return next(file for file in files if file not in taken and not file.exists())
