"""The file of a recording: named arrays in safetensors, with their origin as metadata."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nmlightning.errors import InputError

FILE_NAME = "weight_norms.safetensors"
FORMAT = "nmlightning weight norms"
VERSION = 1
_DTYPES = {
    "steps": np.int64,
    "epochs": np.int64,
    "learning_rates": np.float64,
    "weight_decays": np.float64,
}
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
    with the seed in the folder of an experiment, which has a folder `version_N` for each run.

    Raises:
        InputError: there is no recording, or none with this seed.
    """
    if path.is_file():
        return path
    if (path / FILE_NAME).is_file():
        return path / FILE_NAME
    found = sorted(path.glob(f"version_*/{FILE_NAME}"), key=lambda file: file.stat().st_mtime)
    seeds = [read_recording(file)["provenance"].get("seed") for file in found]
    fitting = [file for file, recorded in zip(found, seeds, strict=True) if recorded == seed]
    if fitting:
        return fitting[-1]
    if found:
        raise InputError(
            f"{path} has no recording of a run with seed {seed}, only with {_listed(seeds)}: run "
            f"it with that seed, or name the folder of one run, such as {found[-1].parent}, and "
            "set other_run."
        )
    raise InputError(
        f"There is no recording of weight norms at {path}: run the experiment that makes it first, "
        "with WeightNormTracker among its callbacks."
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
        recording = {name: arrays[name].astype(dtype) for name, dtype in _DTYPES.items()}
        norms = {name: arrays[_NORMS + name].astype(np.float32) for name in names}
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{file} is damaged: {error} is missing or unreadable.") from error
    return {**recording, "norms": norms, "provenance": provenance}


def _listed(seeds: list[Any]) -> str:
    return ", ".join(dict.fromkeys(map(str, seeds)))


def _read(file: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    if not file.is_file():
        raise InputError(f"There is no recording of weight norms at {file}.")
    try:
        with safe_open(file, framework="np") as content:
            names = list(content.keys())
            return {name: content.get_tensor(name) for name in names}, content.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{file} is truncated or no safetensors file ({error}).") from error
