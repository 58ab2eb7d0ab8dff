"""The file that a run records into, and the records in it that the run goes on with."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from nmlightning.weights.history import NormHistory
from nmlightning.weights.recording_file import FILE_NAME


@dataclass(frozen=True)
class KeptRecording:
    """Where a run keeps its records.

    Attributes:
        file: nothing but this run is in it.
        run: a name that a run and those that go on with it share, and no other.
    """

    file: Path
    run: str

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return what the run needs that goes on from the record at `step`."""
        return {"file": str(self.file.absolute()), "run": self.run, "step": step}


def keep_recording(
    folder: Path, state: Mapping[str, Any]
) -> tuple[KeptRecording, NormHistory | None]:
    """Return where a run in `folder` keeps its records, and those it goes on with.

    A run goes on in its own file if that is in this folder; what it recorded there after the
    checkpoint is then replaced. Every other run gets a name that nothing has yet.

    Args:
        folder: of the run.
        state: of the run that it goes on with, by `state_dict`; empty for a new one.
    """
    file = _file_of(folder, state) if state else None
    if file is None:
        return KeptRecording(_free_file(folder), uuid4().hex), None
    earlier = NormHistory.load(file, finite=False).until(int(state["step"]))
    at_home = file.parent.resolve() == folder.resolve()
    return KeptRecording(file if at_home else _free_file(folder), state["run"]), earlier


def _file_of(folder: Path, state: Mapping[str, Any]) -> Path | None:
    """Return the file of a run, also from a folder that was moved."""
    noted = Path(state["file"])
    for file in (noted, folder / noted.name):
        if (
            file.is_file()
            and NormHistory.load(file, finite=False).provenance.get("run") == state["run"]
        ):
            return file
    warnings.warn(
        f"The recording that the checkpoint goes on with is gone: {noted}. The new one "
        f"starts at step {state['step']}.",
        stacklevel=2,
    )
    return None


def _free_file(folder: Path) -> Path:
    """Return a file name in `folder` that nothing has yet."""
    stem, suffix = FILE_NAME.split(".")
    names = (FILE_NAME, *(f"{stem}-v{version}.{suffix}" for version in range(1, 10_000)))
    return next(folder / name for name in names if not (folder / name).exists())
