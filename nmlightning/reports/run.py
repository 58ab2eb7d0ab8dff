"""The scalars and settings that a run left in its folder."""

import csv
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from nmlightning.errors import InputError
from nmlightning.weights.history import NormHistory
from nmlightning.weights.recording_file import FILE_NAME
from nmlightning.yaml_text import load_yaml


class Point(NamedTuple):
    """One logged number; `time` is in seconds since 1970, NaN where it was not logged."""

    tag: str
    step: int
    value: float
    time: float


@dataclass(frozen=True, eq=False)
class Series:
    """The numbers that were logged under one tag: steps (T,), increasing, and values (T,)."""

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


def check_regular(file: Path) -> None:
    """Raise InputError for a pipe or a device, which may never end."""
    if file.exists() and not file.is_file():
        raise InputError(f"{file} is not a regular file; remove it from the run.")


def read_event_file(file: Path) -> Iterator[Point]:
    """Yield TensorBoard's scalars. A record cut off, as of a run that still writes, is the end.

    TensorBoard's own reader takes seconds for a run with pictures: it checks bytes in Python.
    """
    check_regular(file)
    try:
        for record in _records(file.read_bytes()):
            event = Event.FromString(record)
            for value in event.summary.value:
                number = _number(value)
                if number is not None:
                    yield Point(value.tag, event.step, number, event.wall_time)
    except (DecodeError, ValueError) as error:
        raise InputError(f"{file} is damaged, or not an event file of TensorBoard.") from error


def _records(content: bytes) -> Iterator[bytes]:
    """Yield the records that are whole, or raise ValueError if a checksum is wrong."""
    start, size, is_length = 0, 8, True  # a length of 8 bytes, a record, …; a checksum behind each
    while (end := start + size) + 4 <= len(content):
        part = content[start:end]
        if _checksum(part) != int.from_bytes(content[end : end + 4], "little"):
            raise ValueError("a checksum differs")
        if not is_length:
            yield part
        start, size = end + 4, int.from_bytes(part, "little") if is_length else 8
        is_length = not is_length


def _checksum(message: bytes) -> int:
    """Return the CRC-32C, masked as TensorBoard has it."""
    crc = int(google_crc32c.value(message))
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _number(value: Summary.Value) -> float | None:
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if value.metadata.plugin_data.plugin_name == "scalars" and len(value.tensor.float_val) == 1:
        return float(value.tensor.float_val[0])
    return None


def read_csv_file(file: Path) -> Iterator[Point]:
    """Yield the scalars of Lightning's CSVLogger, but for those of a line that has no end."""
    check_regular(file)
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(line for line in lines if line.endswith(("\n", "\r"))):
                step = int(np.int64(int(row.pop("step"))))  # or OverflowError
                for tag, text in row.items():
                    if text:
                        yield Point(tag, step, float(text), math.nan)
    except (KeyError, TypeError, ValueError, OverflowError, csv.Error) as error:
        raise InputError(f"{file} is damaged, or not of Lightning's CSVLogger.") from error


def _cut_off(files: Iterable[Path]) -> tuple[Path, ...]:
    """Return the files whose last line has no end."""
    contents = {file: file.read_bytes() for file in files if file.is_file()}
    return tuple(f for f, text in contents.items() if text and not text.endswith((b"\n", b"\r")))


# Keys that say who ran it and where, not what was run.
_IGNORED_KEYS = (
    *("seed_everything", "ckpt_path", "weights_only", "data.root", "trainer.logger"),
    *("trainer.log_every_n_steps", "trainer.num_sanity_val_steps", "trainer.profiler"),
    *("trainer.default_root_dir", "trainer.enable_progress_bar", "trainer.enable_model_summary"),
    *("keep_freed_memory", "build_kernels"),
)
# A reference of another seed belongs to the same setting.
_IGNORED_NAMES = ("reference", "_instantiator")


def read_saved_config(folder: Path) -> dict[str, Any]:
    """Return what a run's `config.yaml`, or else `hparams.yaml`, says; {} without them."""
    file = next((folder / name for name in CONFIGS if (folder / name).is_file()), None)
    if file is None:
        return {}
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not YAML text: {error}.") from error
    content = load_yaml(text, str(file), objects=True)
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
            yield from _flatten(inner, f"{key}.{name}".removeprefix("."))
    elif isinstance(value, list) and value and all(map(_is_class, value)):
        for inner in value:
            name = f"{key}.{_class_name(inner)}".removeprefix(".")
            yield name, "yes"
            yield from _flatten(inner.get("init_args") or {}, name)
    else:
        plain = value if isinstance(value, bool | int | float | None) else _clean(str(value))
        yield _clean(key), plain


def _clean(text: str) -> str:
    """Return the text with an escape for what no file can hold, half of a surrogate pair."""
    return text.encode(errors="backslashreplace").decode()


def _is_class(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("class_path"), str)


def _class_name(value: Mapping[str, Any]) -> str:
    return str(value["class_path"]).rpartition(".")[2]


_EVENTS, CSV_FILE = "events.out.tfevents.*", "metrics.csv"
CONFIGS = ("config.yaml", "hparams.yaml")


@dataclass(frozen=True, eq=False)
class Run:
    """One run."""

    folder: Path
    settings: Mapping[str, Any]  # as `flatten_settings` has them; empty if it left no config
    seed: int | None  # of `seed_everything`, if its config says it
    scalars: Mapping[str, Series]  # by tag
    seconds: float  # from the first to the last number it logged, NaN if that was not noted
    parts: tuple[Path, ...]  # the folders of this run, and before it of those that it resumes
    cut_off: tuple[Path, ...] = ()  # CSV files that end within a line
    norms: NormHistory | None = None
    checkpoint: Path | None = None  # that it resumed from, if its config says it

    @property
    def name(self) -> str:
        """The name of the folder, or of that above `version_3`, without the seed in `wd_on-1`."""
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
    """
    folders: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise InputError(f"there is no folder {str(path)!r} in {Path.cwd()}.")
        tables = [file for file in path.rglob("*.csv") if file.name != CSV_FILE]
        kept = {x.with_suffix("") for x in tables if x.with_suffix(".json").is_file()}
        found = _find_logs(path).keys() | kept
        if not found:
            raise InputError(
                f"{path} holds no run: there is neither an event file of TensorBoard nor a "
                f"metrics.csv in it or below it."
            )
        folders |= dict.fromkeys(sorted(found, key=_natural_order))
    return list(folders)


def read_runs(paths: Sequence[str | Path]) -> tuple[list[Run], dict[Path, str]]:
    """Return the runs at and below these paths, and of each that cannot be read the reason."""
    runs, left_out = [], {}
    for folder in find_runs(paths):
        try:
            runs.append(read_run(folder))
        except InputError as error:
            left_out[folder] = str(error)
    return runs, left_out


def _find_logs(path: Path) -> dict[Path, list[Path]]:
    """Return the folders of runs at and below a path; of each those that it has logged to.

    A folder within a run that looks like none is of the run, as those are that `add_scalars` and
    `add_hparams` make; deeper than they do only where the run has a config. One that may not be
    read counts, for `read_run` to say so, and so does a `version_3` that has its config alone, as
    of a run that was killed at its start.
    """
    found: dict[Path, list[Path]] = {}
    hidden: list[Path] = []
    begun: list[Path] = []
    for place, folders, files in os.walk(
        path, onerror=lambda error: hidden.append(Path(error.filename))
    ):
        folder = Path(place)
        if any(fnmatch(name, _EVENTS) or name == CSV_FILE for name in files):
            outer = next((parent for parent in folder.parents if parent in found), folder)
            is_own = {CSV_FILE, *CONFIGS, "checkpoints"} & {*files, *folders} or (
                re.fullmatch(r"version_\d+", folder.name)
                or (folder.parent != outer and not any((outer / x).is_file() for x in CONFIGS))
            )
            found.setdefault(folder if is_own else outer, []).append(folder)
        elif CONFIGS[0] in files and folder.name.startswith("version_"):
            begun.append(folder)
    inner = {parent for folder in found for parent in folder.parents}
    begun = [x for x in begun if x not in inner and not found.keys() & set(x.parents)]
    return found | {folder: [folder] for folder in (*hidden, *begun)}


def has_events(folder: Path) -> bool:
    """Return whether a run left anything for TensorBoard."""
    return any(event_files(folder))


def event_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(_EVENTS))


def read_run(folder: Path) -> Run:
    """Return what is in a run's folder, or raise InputError for one that cannot be read."""
    try:
        if not folder.is_dir():
            return _read_kept(folder)
        os.listdir(folder)  # which glob would take for empty
        return _read_folder(folder)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}.") from error


def _read_folder(folder: Path) -> Run:
    config = read_saved_config(folder)
    logs = {place: list(_read_logs(place, folder)) for place in _find_logs(folder).get(folder, [])}
    own = {point.tag for point in logs.get(folder, [])}  # of `add_hparams` it has the end alone
    points = [p for place, x in logs.items() for p in x if place == folder or p.tag not in own]
    times = [point.time for point in points if math.isfinite(point.time)]
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
        cut_off=_cut_off(place / CSV_FILE for place in logs),
    )


def _read_logs(place: Path, run: Path) -> Iterator[Point]:
    """Yield what a run has logged to one of its folders.

    `add_scalars("loss", {"a": …})` logs "loss" to `loss_a`, which is the tag `loss/a` here.
    """
    for file in event_files(place):
        for point in read_event_file(file):
            start = point.tag.replace("/", "_") + "_"
            if place != run and place.name.startswith(start):
                point = point._replace(tag=f"{point.tag}/{place.name.removeprefix(start)}")
            yield point
    if (place / CSV_FILE).exists():
        yield from read_csv_file(place / CSV_FILE)


def _read_kept(place: Path) -> Run:
    """Return the run that `<place>.csv` has the curves of and `<place>.json` the settings."""
    file = place.with_suffix(".json")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        settings, seed, minutes = (content[key] for key in ("settings", "seed", "cpu_minutes"))
        settings = flatten_settings(dict(settings))
        seconds = 60 * float(minutes)
        if not (seed is None or type(seed) is int) or math.isinf(seconds):
            raise TypeError(seed)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{file} is damaged, or not of a run.") from error
    return Run(
        folder=place,
        settings=settings,
        seed=seed,
        scalars=make_series(read_csv_file(place.with_suffix(".csv"))),
        seconds=seconds,
        parts=(place,),
        cut_off=_cut_off([place.with_suffix(".csv")]),
    )


def _natural_order(path: Path) -> list[str | int]:
    """Return a key by which version_10 follows version_9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]
