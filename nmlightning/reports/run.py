"""The scalars and settings that a run left in its folder.

TensorBoard's own reader checks every byte in Python, which takes seconds for a run with pictures;
here records are framed without that, and their messages are parsed by protobuf in C.
"""

import csv
import json
import math
import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from nmlightning.errors import InputError
from nmlightning.weights.history import NormHistory
from nmlightning.weights.recording_file import FILE_NAME


class Point(NamedTuple):
    """One logged number; `time` is in seconds since 1970, NaN where it was not logged."""

    tag: str
    step: int
    value: float
    time: float


@dataclass(frozen=True, eq=False)
class Series:
    """The numbers that were logged under one tag.

    Attributes:
        steps: (T,) int64, increasing.
        values: (T,) float64.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def at(self, steps: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the values at these steps, NaN where there is none."""
        found = np.searchsorted(self.steps, steps).clip(max=len(self.steps) - 1)
        return np.where(self.steps[found] == steps, self.values[found], np.nan)


def make_series(points: Iterable[Point]) -> dict[str, Series]:
    """Return the series of each tag; of two points at one step the later one counts."""
    by_tag: dict[str, dict[int, float]] = defaultdict(dict)
    for point in points:
        by_tag[point.tag][point.step] = point.value
    return {
        tag: Series(
            np.array(sorted(values), dtype=np.int64),
            np.array([values[step] for step in sorted(values)], dtype=np.float64),
        )
        for tag, values in by_tag.items()
    }


# A record is its length, the checksum of that, its content, and the checksum of that.
_HEADER = struct.Struct("<QI")
_FOOTER_SIZE = 4


def read_event_file(file: Path) -> Iterator[Point]:
    """Yield the scalars. A record that is not whole, as of a run that still writes, is the end.

    Raises:
        InputError: the file holds something else.
    """
    for record in _records(file.read_bytes()):
        try:
            event = Event.FromString(record)
        except DecodeError as error:
            raise InputError(f"{file} is damaged, or no event file of TensorBoard.") from error
        for value in event.summary.value:
            number = _number(value)
            if number is not None:
                yield Point(value.tag, event.step, number, event.wall_time)


def _records(content: bytes) -> Iterator[bytes]:
    start = 0
    while start + _HEADER.size <= len(content):
        length, _ = _HEADER.unpack_from(content, start)
        begin, start = start + _HEADER.size, start + _HEADER.size + length + _FOOTER_SIZE
        if start <= len(content):
            yield content[begin : begin + length]


def _number(value: Summary.Value) -> float | None:
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if value.metadata.plugin_data.plugin_name == "scalars" and len(value.tensor.float_val) == 1:
        return float(value.tensor.float_val[0])
    return None


def read_csv_file(file: Path) -> Iterator[Point]:
    """Yield the scalars.

    Raises:
        InputError: there is no column `step`, or something that is no number.
    """
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                step = int(row.pop("step"))
                for tag, text in row.items():
                    if text:
                        yield Point(tag, step, float(text), math.nan)
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(f"{file} is damaged, or not of Lightning's CSVLogger.") from error


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads what any project's hyper-parameters hold; of an object it takes the type's name."""


_Loader.add_multi_constructor("", lambda loader, suffix, node: suffix)

# Keys that say who ran it and where, not what was run.
_IGNORED_KEYS = (
    *("seed_everything", "ckpt_path", "weights_only", "data.root", "trainer.logger"),
    *("trainer.default_root_dir", "trainer.enable_progress_bar", "trainer.enable_model_summary"),
)
# A reference of another seed belongs to the same setting.
_IGNORED_NAMES = ("reference", "_instantiator")


def read_saved_config(folder: Path) -> dict[str, Any]:
    """Return what `config.yaml`, or else `hparams.yaml`, in a run's folder says; {} without them.

    Raises:
        InputError: the file is no YAML.
    """
    file = next((f for f in (folder / "config.yaml", folder / "hparams.yaml") if f.is_file()), None)
    if file is None:
        return {}
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is no YAML: {error}.") from error
    return content if isinstance(content, dict) else {}


def flatten_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a config, without what has no influence on the result.

    Nothing of value None is a setting. The name of a class stands for its path, and as the key of
    what is in a list:

    >>> flatten_settings({"net": {"class_path": "a.Net", "init_args": {"depth": 3}}})
    {'net': 'Net', 'net.depth': 3}
    >>> flatten_settings({"callbacks": [{"class_path": "a.Swap", "init_args": {"norm": "l1"}}]})
    {'callbacks.Swap': 'yes', 'callbacks.Swap.norm': 'l1'}
    """
    return {
        key: value
        for key, value in _flatten(config, "")
        if value is not None
        and not any(key == name or key.startswith(f"{name}.") for name in _IGNORED_KEYS)
        and key.rpartition(".")[2] not in _IGNORED_NAMES
    }


def _flatten(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if _is_class(value):
        yield key, _class_name(value)
        yield from _flatten(value.get("init_args") or {}, key)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flatten(inner, _join(key, str(name)))
    elif isinstance(value, list) and value and all(map(_is_class, value)):
        for inner in value:
            yield _join(key, _class_name(inner)), "yes"
            yield from _flatten(inner.get("init_args") or {}, _join(key, _class_name(inner)))
    else:
        yield key, str(value) if isinstance(value, list) else value


def _is_class(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("class_path"), str)


def _class_name(value: Mapping[str, Any]) -> str:
    return str(value["class_path"]).rpartition(".")[2]


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


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
        checkpoint: that it resumed from, if its config says it.
        parts: the folders of this run, and before it of those that it resumes.
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
        """The name of the experiment: that of the folder, or of the one above `version_3`.

        A seed at its end, as in `wd_on-1`, is left out.
        """
        folder = self.folder.resolve()
        name = folder.parent.name if folder.name.startswith("version_") else folder.name
        return name.removesuffix(f"-{self.seed}")

    def epochs_at(self, steps: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return how many epochs were over when these steps were logged, or else the steps."""
        if "epoch" not in self.scalars:
            return steps.astype(np.float64)
        epochs = self.scalars["epoch"].at(steps)
        return steps.astype(np.float64) if np.isnan(epochs).any() else epochs + 1


def find_runs(paths: Sequence[str | Path]) -> list[Path]:
    """Return the folders of runs at and below these paths, each once, in a natural order.

    A run of which only `a.csv` and `a.json` are kept, as in `results/`, counts as a folder `a`.

    Raises:
        InputError: a path that does not exist or has no run at or below it.
    """
    folders: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise InputError(f"there is no folder {str(path)!r} in {Path.cwd()}.")
        logs = [file for pattern in (_EVENTS, _CSV) for file in path.rglob(pattern)]
        kept = {file.with_suffix("") for file in path.rglob("*.csv") if _is_kept(file)}
        found = kept | {log.parent for log in logs}
        if not found:
            raise InputError(
                f"{path} holds no run: there is neither an event file of TensorBoard nor a "
                f"metrics.csv in it or below it."
            )
        folders |= dict.fromkeys(sorted(found, key=_natural_order))
    return list(folders)


def _is_kept(file: Path) -> bool:
    """Whether a CSV has a JSON of its name beside it, as `results/` has for each run."""
    return file.name != _CSV and file.with_suffix(".json").is_file()


def has_events(folder: Path) -> bool:
    """Return whether a run left anything for TensorBoard."""
    return any(folder.glob(_EVENTS))


def read_run(folder: Path) -> Run:
    """Return what is in a run's folder, or raise InputError where a file is damaged."""
    if not folder.is_dir():
        return _read_kept(folder)
    config = read_saved_config(folder)
    points = [p for file in sorted(folder.glob(_EVENTS)) for p in read_event_file(file)]
    if (folder / _CSV).is_file():
        points += read_csv_file(folder / _CSV)
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


def _read_kept(place: Path) -> Run:
    """Return the run that `<place>.csv` has the curves of and `<place>.json` the settings."""
    file = place.with_suffix(".json")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        settings, seed, minutes = (content[key] for key in ("settings", "seed", "cpu_minutes"))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is damaged, or not of a run.") from error
    return Run(
        folder=place,
        settings=settings,
        seed=seed,
        scalars=make_series(read_csv_file(place.with_suffix(".csv"))),
        seconds=60 * minutes,
        norms=None,
        checkpoint=None,
        parts=(place,),
    )


def _natural_order(path: Path) -> list[str | int]:
    """Return a key by which version_10 follows version_9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]
