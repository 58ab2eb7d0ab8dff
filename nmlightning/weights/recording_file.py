"""The file of a recording: checked arrays in safetensors, with their origin as metadata."""

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nmlightning.errors import InputError

FILE_NAME = "weight_norms.safetensors"
FORMAT = "nmlightning weight norms"
VERSION = 1
_ARRAYS = ("steps", "epochs", "learning_rates", "weight_decays")
_NORMS = "norms/"


def write_recording(
    file: Path,
    norms: Mapping[str, NDArray[np.float32]],
    provenance: Mapping[str, Any],
    **arrays: NDArray[Any],
) -> None:
    """Write the file at once or not at all, so that a reader never finds half of it."""
    arrays |= {_NORMS + name: values for name, values in norms.items()}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "names": json.dumps(list(norms)),
        "provenance": json.dumps(dict(provenance)),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        save_file(contiguous, unfinished, metadata)
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def find_recording(path: Path, seed: int | None) -> Path:
    """Return the recording that a path means to a run with this seed.

    That is the path itself if it is a file, the file in a run's folder, or that of the latest run
    with the seed in the folder of an experiment, which has a folder `version_N` for each run. A run
    that finished goes before one that was stopped; a damaged file is passed over with a warning.

    Raises:
        InputError: there is no recording, or none with this seed.
    """
    if path.is_file():
        return path
    if (path / FILE_NAME).is_file():
        return path / FILE_NAME
    files = sorted(path.glob(f"version_*/{FILE_NAME}"), key=lambda file: file.stat().st_mtime)
    found = {file: origin for file in files if (origin := _read_origin(file)) is not None}
    fitting = [file for file, origin in found.items() if origin.get("seed") == seed]
    if fitting:
        return max(reversed(fitting), key=lambda file: found[file].get("finished") is not False)
    if found:
        seeds = ", ".join(dict.fromkeys(str(origin.get("seed")) for origin in found.values()))
        raise InputError(
            f"{path} has no recording of a run with seed {seed}, only with {seeds}: run "
            f"it with that seed, or name the folder of one run, such as {list(found)[-1].parent}, "
            "and set other_run."
        )
    raise InputError(
        f"There is no recording of weight norms at {path}{' that can be read' if files else ''}: "
        "run the experiment that makes it first, with WeightNormTracker among its callbacks."
    )


def read_recording(file: Path) -> dict[str, Any]:
    """Return `norms` by name, `provenance` and the other arrays, or raise InputError."""
    arrays, metadata = _read(file)
    if metadata.get("format") != FORMAT:
        raise InputError(f"{file} is a safetensors file, but no recording of weight norms.")
    if metadata.get("version") != str(VERSION):
        raise InputError(
            f"{file} has version {metadata.get('version')} of the format, and this release reads "
            f"{VERSION}: install the release that wrote it."
        )
    try:
        names, provenance = (json.loads(metadata[key]) for key in ("names", "provenance"))
        recording = {name: arrays[name] for name in _ARRAYS}
        norms = {name: arrays[_NORMS + name] for name in names}
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{file} is damaged: {error} is missing or unreadable.") from error
    return {**recording, "norms": norms, "provenance": provenance}


def _read_origin(file: Path) -> Mapping[str, Any] | None:
    """Return the provenance, or None and a warning for a file that is damaged."""
    try:
        origin = read_recording(file)["provenance"]
        if isinstance(origin, Mapping):
            return origin
        reason = f"{file} is damaged"
    except InputError as error:
        reason = str(error).rstrip(".")
    warnings.warn(f"{reason}; it is passed over.", stacklevel=3)
    return None


def _read(file: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    if not file.is_file():
        raise InputError(f"There is no recording of weight norms at {file}.")
    try:
        with safe_open(file, framework="np") as content:
            names = list(content.keys())
            return {name: content.get_tensor(name) for name in names}, content.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{file} is truncated or no safetensors file ({error}).") from error


def make_arrays(
    norms: Mapping[str, ArrayLike],
    steps: ArrayLike,
    epochs: ArrayLike,
    learning_rates: ArrayLike | None = None,
    weight_decays: ArrayLike | None = None,
    *,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the arguments of a `NormHistory`; rates that are None are unknown.

    Raises:
        InputError: what is no number, no whole number or no plain data; shapes that do not fit
            together; a clock that runs backwards; a negative norm.
    """
    if not isinstance(norms, Mapping):
        kind = type(norms).__name__
        raise InputError(f"norms is a mapping from names of weights to arrays, got a {kind}")
    strange = next((name for name in norms if not isinstance(name, str)), None)
    if strange is not None:
        raise InputError(f"norms has the name {strange!r}, which is no string")
    if not isinstance(provenance, Mapping) or not _is_plain(dict(provenance)):
        raise InputError(f"provenance is a mapping of plain data, got {repr(provenance)[:60]}")
    arrays = {name: _numbers(name, values).astype(np.float32) for name, values in norms.items()}
    clock = {"steps": _whole_numbers("steps", steps), "epochs": _whole_numbers("epochs", epochs)}
    shape = (len(clock["steps"]), len(norms))
    rates = {
        "learning_rates": _rates("learning_rates", learning_rates, shape),
        "weight_decays": _rates("weight_decays", weight_decays, shape),
    }
    problem = next(_problems(arrays, clock["steps"], clock["epochs"], rates), None)
    if problem:
        raise InputError(problem)
    return {"norms": arrays, **clock, **rates, "provenance": dict(provenance)}


def check_finite(norms: Mapping[str, NDArray[np.float32]], epochs: NDArray[np.int64]) -> None:
    """Raise InputError for norms that are NaN or infinite."""
    for name, values in norms.items():
        bad = ~np.isfinite(values)
        if bad.any():
            record = int(bad.any(1).argmax())
            raise InputError(
                f"the norms of {name} are not finite from record {record} (epoch "
                f"{epochs[record]}) on, so the run it is of diverged"
            )


def _numbers(name: str, values: ArrayLike) -> NDArray[Any]:
    try:
        array = np.asarray(values)
    except (ValueError, TypeError):
        array = np.array(None)
    if array.dtype.kind not in "iuf":
        raise InputError(f"{name} holds no array of numbers")
    return array


def _whole_numbers(name: str, values: ArrayLike) -> NDArray[np.int64]:
    array = _numbers(name, values)
    if array.ndim != 1:
        raise InputError(f"{name} has shape {array.shape}, expected (records,)")
    broken = array[~(np.isfinite(array) & (array == np.floor(array)))]
    if len(broken):
        raise InputError(f"{name} are whole numbers, got {broken[0]:g}")
    return array.astype(np.int64)


def _rates(name: str, values: ArrayLike | None, shape: tuple[int, int]) -> NDArray[np.float64]:
    if values is None:
        return np.full(shape, np.nan)
    rates: NDArray[np.float64] = _numbers(name, values).astype(np.float64)
    return rates


def _is_plain(data: Any) -> bool:
    try:
        json.dumps(data)
    except (TypeError, ValueError):
        return False
    return True


def _problems(
    norms: Mapping[str, NDArray[np.float32]],
    steps: NDArray[np.int64],
    epochs: NDArray[np.int64],
    rates: Mapping[str, NDArray[np.float64]],
) -> Iterator[str]:
    """Yield what is wrong with the shapes and the clock."""
    records = len(steps)
    if len(epochs) != records:
        yield f"{records} steps, but epochs of shape {epochs.shape}"
        return
    for name, rate in rates.items():
        if rate.shape != (records, len(norms)):
            yield f"{name} has shape {rate.shape}, expected {(records, len(norms))}"
    for name, values in norms.items():
        if values.ndim != 2 or values.shape[0] != records:
            yield f"{name} has shape {values.shape}, expected ({records}, channels)"
        elif (values < 0).any():
            yield f"{name} has a negative norm in record {int((values < 0).any(1).argmax())}"
    if (np.diff(steps) <= 0).any() or (steps < 0).any():
        yield "its steps do not increase"
    if (np.diff(epochs) < 0).any() or (epochs < 0).any():
        yield "its epochs run backwards"
