"""What one run left in its folder."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmlightning.errors import InputError
from nmlightning.reports.csv_file import read_csv_file
from nmlightning.reports.event_file import read_event_file
from nmlightning.reports.series import Point, Series, make_series
from nmlightning.reports.settings import flatten_settings, read_saved_config
from nmlightning.weights.history import NormHistory
from nmlightning.weights.recording_file import FILE_NAME

_EVENTS, _CSV = "events.out.tfevents.*", "metrics.csv"


@dataclass(frozen=True, eq=False)
class Run:
    """One run.

    Attributes:
        folder: where it is kept.
        settings: as `flatten_settings` has them; empty if it left no config.
        seed: of `seed_everything`, if its config says it.
        scalars: what it logged, by tag.
        seconds: from the first to the last number it logged, NaN if that was not noted.
        norms: its recording of weight norms, if it has one.
        checkpoint: what it went on from, if its config says it.
        parts: the folders of this run, and before it of those that it went on with.
    """

    folder: Path
    settings: Mapping[str, Any]
    seed: int | None
    scalars: Mapping[str, Series]
    seconds: float
    norms: NormHistory | None
    checkpoint: Path | None
    parts: tuple[Path, ...]

    @property
    def name(self) -> str:
        """The name of the experiment: that of the folder, or of the one above `version_3`."""
        folder = self.folder.resolve()
        return folder.parent.name if folder.name.startswith("version_") else folder.name

    def epochs_at(self, steps: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return how many epochs were over when these steps were logged, or else the steps."""
        if "epoch" not in self.scalars:
            return steps.astype(np.float64)
        epochs = self.scalars["epoch"].at(steps)
        return steps.astype(np.float64) if np.isnan(epochs).any() else epochs + 1


def find_runs(paths: Sequence[str | Path]) -> list[Path]:
    """Return the folders of runs at and below these paths, each once, in a natural order.

    Raises:
        InputError: a path that does not exist or has no run at or below it.
    """
    folders: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise InputError(f"there is no folder {str(path)!r} in {Path.cwd()}.")
        logs = [file for pattern in (_EVENTS, _CSV) for file in path.rglob(pattern)]
        if not logs:
            raise InputError(
                f"{path} holds no run: there is neither an event file of TensorBoard nor a "
                f"metrics.csv in it or below it."
            )
        folders |= dict.fromkeys(sorted({log.parent for log in logs}, key=_natural_order))
    return list(folders)


def has_events(folder: Path) -> bool:
    """Return whether a run left anything for TensorBoard."""
    return any(folder.glob(_EVENTS))


def read_run(folder: Path) -> Run:
    """Return what is in a run's folder, or raise InputError where a file is damaged."""
    config = read_saved_config(folder)
    points = list(_points(folder))
    times = [point.time for point in points]
    recording = folder / FILE_NAME
    seed, checkpoint = config.get("seed_everything"), config.get("ckpt_path")
    return Run(
        folder=folder,
        settings=flatten_settings(config),
        seed=seed if type(seed) is int else None,
        scalars=make_series(points),
        seconds=float(np.max(times) - np.min(times)) if times else float("nan"),
        norms=NormHistory.load(recording, finite=False) if recording.is_file() else None,
        checkpoint=Path(checkpoint) if isinstance(checkpoint, str) else None,
        parts=(folder,),
    )


def _points(folder: Path) -> Iterator[Point]:
    for file in sorted(folder.glob(_EVENTS)):
        yield from read_event_file(file)
    if (folder / _CSV).is_file():
        yield from read_csv_file(folder / _CSV)


def _natural_order(path: Path) -> list[str | int]:
    """Return a key by which version_10 follows version_9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]
