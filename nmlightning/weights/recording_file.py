"""The file of a recording: checked arrays, with their origin as metadata and a checksum.

One that is written at once is a safetensors file. One that grows with a run begins as one without
arrays; behind it are the records, of one size each, so that readers map them into memory.
"""

import json
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from nmlightning.atomic_file import explain_failure, replace_file
from nmlightning.errors import InputError

FILE_NAME = "weight_norms.safetensors"
FORMAT = "nmlightning weight norms"
# The first may lack a checksum; the last grows, too, and has quantities beside the norms.
VERSIONS = UNCHECKED_VERSION, GROWING_VERSION, VERSION, QUANTITIES_VERSION = 1, 3, 4, 5
_ARRAYS = ("steps", "epochs", "learning_rates", "weight_decays")
_NORMS, _QUANTITIES = "norms/", "quantities/"
_FINISHED, _REPEATED = 1, 2  # marks of a record: the run finished; the record before, once more


def write_recording(
    file: Path,
    norms: Mapping[str, NDArray[np.float32]],
    provenance: Mapping[str, Any],
    quantities: Mapping[str, NDArray[np.float32]],
    **arrays: NDArray[Any],
) -> None:
    """Write the file at once or not at all, so that a reader never finds half of it."""
    arrays |= {_NORMS + name: values for name, values in norms.items()}
    arrays |= {_QUANTITIES + name: values for name, values in quantities.items()}
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "names": json.dumps(list(norms)),
        "provenance": json.dumps(dict(provenance)),
    }
    metadata["crc32"] = _checksum(metadata, contiguous)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(file) as opened:
        opened.write(save(contiguous, metadata))


def _checksum(metadata: Mapping[str, str], arrays: Mapping[str, NDArray[Any]]) -> str:
    checksum = zlib.crc32((metadata["names"] + metadata["provenance"]).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        if metadata["version"] != str(UNCHECKED_VERSION):
            checksum = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), checksum)
        checksum = zlib.crc32(array.view(np.uint8).data, checksum)
    return str(checksum)


def record_type(channels: Sequence[int], quantities: Sequence[str] = ()) -> np.dtype[Any]:
    """Return the type of the records of weights with these channels; a multiple of 8 bytes."""
    shape = (len(quantities), len(channels))
    more: list[Any] = [("quantities", "<f4", shape)] if quantities else []
    pad = [("pad", "<u4")] if (sum(channels) + shape[0] * shape[1]) % 2 else []
    counts = [("crc32", "<u4"), ("marks", "<u4"), ("steps_per_epoch", "<i8")]
    rates = ("rates", "<f8", (len(channels), 2))
    clock = [("step", "<i8"), ("epoch", "<i8")]
    return np.dtype([*counts, *clock, rates, ("norms", "<f4", (sum(channels),)), *more, *pad])


class GrowingRecording:
    """A recording in a file, to which a run appends: what is in there is not written again.

    It is written at once, with the records to begin with, in parts; an earlier file is replaced.
    """

    def __init__(
        self,
        file: Path,
        channels: Mapping[str, int],
        provenance: Mapping[str, Any],
        count: int,
        records: Iterable[NDArray[Any]],
        quantities: Sequence[str] = (),
    ) -> None:
        self.file = file
        self._size = record_type(list(channels.values()), quantities).itemsize
        content = {"channels": dict(channels), "provenance": dict(provenance), "whole": count}
        content |= {"quantities": list(quantities)} if quantities else {}
        text = json.dumps(content)
        metadata = {
            "format": FORMAT,
            "version": str(QUANTITIES_VERSION if quantities else GROWING_VERSION),
            "content": text,
            "crc32": str(zlib.crc32(text.encode())),
        }
        header = save({}, metadata)
        file.parent.mkdir(parents=True, exist_ok=True)
        self._last = b""
        with replace_file(file) as opened:
            opened.write(header)
            for part in records:
                opened.write(sealed := _seal(part, provenance).tobytes())
                self._last = sealed[-self._size :] or self._last
            self._inode = os.fstat(opened.fileno()).st_ino
        self._end = len(header) + count * self._size

    def append(self, records: NDArray[Any], provenance: Mapping[str, Any]) -> None:
        """Write records behind those that are there, and whether the run finished."""
        if not len(records):
            records = np.frombuffer(self._last, records.dtype).copy()
            if not provenance.get("finished") or (records["marks"] & _FINISHED).all():
                return
            records["marks"] = _REPEATED
        content = _seal(records, provenance).tobytes()
        fate = "; the earlier records are intact"
        with explain_failure(self.file, fate), self.file.open("r+b") as opened:
            if os.fstat(opened.fileno()).st_ino != self._inode:
                raise InputError(f"{self.file} was replaced by another run; stop one of them.")
            opened.seek(self._end)  # over what an append that failed has left
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        self._end += len(content)
        self._last = content[-self._size :] or self._last


def _seal(records: NDArray[Any], provenance: Mapping[str, Any]) -> NDArray[Any]:
    """Note in records what is known of the run by now, and their checksums."""
    known = provenance.get("steps_per_epoch")
    records["steps_per_epoch"] = known if type(known) is int else -1
    records["marks"] |= _FINISHED if provenance.get("finished") is True else 0
    records["crc32"] = _checksums(records)
    return records


def _checksums(records: NDArray[Any]) -> NDArray[np.uint32]:
    content = records.view(np.uint8).reshape(len(records), records.itemsize)[:, 4:]
    return np.array([zlib.crc32(each.data) for each in content], dtype=np.uint32)


def find_recording(path: Path, seed: int | None) -> Path:
    """Return the recording that a path means to a run with this seed.

    That is the path itself if it is a file, the file in a run's folder, or that of the latest run
    with the seed in the folder of an experiment, which has a folder `version_N` for each run. A run
    that finished goes before one that was stopped; a damaged file is passed over with a warning.
    """
    with explain_unreadable(path):
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


@contextmanager
def explain_unreadable(path: Path) -> Iterator[None]:
    """Turn an OSError of the body, as for a name that is too long, into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_recording(file: Path) -> dict[str, Any]:
    """Return `norms` by name, `provenance` and the other arrays, or raise InputError."""
    metadata, start = _read_metadata(file)
    if metadata.get("format") != FORMAT:
        raise InputError(f"{file} is a safetensors file, but no recording of weight norms.")
    if metadata.get("version") not in {str(each) for each in VERSIONS}:
        raise InputError(
            f"{file} has version {metadata.get('version')} of the format, of which this release "
            f"reads {', '.join(map(str, VERSIONS))}: install the release that wrote it."
        )
    try:
        if metadata["version"] in (str(GROWING_VERSION), str(QUANTITIES_VERSION)):
            return _read_growing(file, metadata, start)
        try:
            arrays = load_file(file)
        except (SafetensorError, TypeError, AttributeError) as error:  # a dtype that numpy lacks
            raise InputError(f"{file} is truncated or not a safetensors file ({error}).") from error
        names, provenance = (json.loads(metadata[key]) for key in ("names", "provenance"))
        recording = {name: arrays[name] for name in _ARRAYS}
        norms = {name: arrays[_NORMS + name] for name in names}
        more = {k.partition(_QUANTITIES)[2]: v for k, v in arrays.items() if k[0] == "q"}
        if metadata["version"] == str(VERSION):
            metadata["crc32"]  # is there, or KeyError
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is damaged: {error} is missing or unreadable.") from error
    if metadata.get("crc32", expected := _checksum(metadata, arrays)) != expected:
        raise InputError(f"{file} is damaged: its checksum differs.")
    return {**recording, "norms": norms, "provenance": provenance, "quantities": more}


def _read_growing(file: Path, metadata: Mapping[str, str], start: int) -> dict[str, Any]:
    """Return views of the records in the file; one that a killed process left torn does not count.

    It can only be the last one, too short, and none of those that were written at once.
    """
    if str(zlib.crc32(metadata["content"].encode())) != metadata["crc32"]:
        raise InputError(f"{file} is damaged: the checksum of its head differs.")
    head = json.loads(metadata["content"])
    channels, provenance = head["channels"], head["provenance"]
    quantities = head.get("quantities", [])
    kind = record_type(list(channels.values()), quantities)
    count = (file.stat().st_size - start) // kind.itemsize
    records: NDArray[Any] = np.zeros(0, kind)
    if count:
        records = np.asarray(np.memmap(file, kind, "c", offset=start, shape=(count,)))
    good = records["crc32"] == _checksums(records)
    if not good.all():
        bad, end = int(good.argmin()), start + int(good.argmin()) * kind.itemsize
        cut = f"; to keep those before it: truncate -s {end} {file}"
        raise InputError(
            f"{file} is damaged: the checksum of record {bad} differs"
            f"{cut if bad >= max(1, head['whole']) else ''}."
        )
    if count < head["whole"]:
        raise InputError(
            f"{file} is truncated or not a safetensors file ({count} of {head['whole']} records)."
        )
    if torn := (file.stat().st_size - start) % kind.itemsize:
        warnings.warn(
            f"{file} ends in {torn} bytes of an incomplete record, which is left out.", stacklevel=4
        )
    if count:
        last = records[-1]
        known = {"steps_per_epoch": int(last["steps_per_epoch"])}
        provenance |= known if known["steps_per_epoch"] >= 0 else {}
        provenance |= {"finished": bool(last["marks"] & _FINISHED)}
        records = records[: count - bool(last["marks"] & _REPEATED)]
    return {**split_records(records, channels, quantities), "provenance": provenance}


def split_records(
    records: NDArray[Any], channels: Mapping[str, int], quantities: Sequence[str] = ()
) -> dict[str, Any]:
    """Return views of `record_type` records: `norms`, `quantities` by name, and other arrays."""
    columns = np.split(records["norms"], np.cumsum(list(channels.values()))[:-1], axis=1)
    return {
        "norms": dict(zip(channels, columns, strict=False)),
        "steps": records["step"],
        "epochs": records["epoch"],
        "learning_rates": records["rates"][:, :, 0],
        "weight_decays": records["rates"][:, :, 1],
        "quantities": {name: records["quantities"][:, n] for n, name in enumerate(quantities)},
    }


def _read_origin(file: Path) -> Mapping[str, Any] | None:
    """Return the provenance, or None and a warning for a file that is damaged."""
    try:
        origin = read_recording(file)["provenance"]
        if isinstance(origin, Mapping):
            return origin
        reason = f"{file} is damaged"
    except InputError as error:
        reason = str(error).rstrip(".")
    warnings.warn(f"{reason}; it is skipped.", stacklevel=3)
    return None


def _read_metadata(file: Path) -> tuple[dict[str, str], int]:
    """Return the metadata of a safetensors file, and where its header ends."""
    if not file.is_file():
        raise InputError(f"There is no recording of weight norms at {file}.")
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(min(length, file.stat().st_size)))
        return dict(header.get("__metadata__", {})), 8 + length
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{file} is truncated or not a safetensors file ({error}).") from error


def make_arrays(
    norms: Mapping[str, ArrayLike],
    steps: ArrayLike,
    epochs: ArrayLike,
    learning_rates: ArrayLike | None = None,
    weight_decays: ArrayLike | None = None,
    *,
    provenance: Mapping[str, Any],
    quantities: Mapping[str, ArrayLike],
) -> dict[str, Any]:
    """Return the arguments of a `NormHistory`; rates that are None are unknown."""
    if not isinstance(norms, Mapping):
        kind = type(norms).__name__
        raise InputError(f"norms is a mapping from names of weights to arrays, got a {kind}")
    strange = next((name for name in norms if not isinstance(name, str)), None)
    if strange is not None:
        raise InputError(f"norms has the name {strange!r}, which is not a string")
    try:
        is_plain = isinstance(provenance, Mapping) and json.dumps(dict(provenance)) != ""
    except (TypeError, ValueError):
        is_plain = False
    if not is_plain:
        raise InputError(f"provenance is a mapping of plain data, got {repr(provenance)[:60]}")
    arrays, more = map(_float32, (norms, quantities))
    clock = {"steps": _whole_numbers("steps", steps), "epochs": _whole_numbers("epochs", epochs)}
    shape = (len(clock["steps"]), len(norms))
    given = {"learning_rates": learning_rates, "weight_decays": weight_decays}
    rates: dict[str, NDArray[Any]] = {k: _rates(k, v, shape) for k, v in given.items()}
    problem = next(_problems(arrays, clock["steps"], clock["epochs"], rates | more), None)
    if problem:
        raise InputError(problem)
    return {"norms": arrays, **clock, **rates, "provenance": dict(provenance), "quantities": more}


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


def _float32(arrays: Mapping[str, ArrayLike]) -> dict[str, NDArray[np.float32]]:
    return {k: _numbers(k, v).astype(np.float32, copy=False) for k, v in arrays.items()}


def _whole_numbers(name: str, values: ArrayLike) -> NDArray[np.int64]:
    array = _numbers(name, values)
    if array.ndim != 1:
        raise InputError(f"{name} has shape {array.shape}, expected (records,)")
    broken = array[~(np.isfinite(array) & (array == np.floor(array)))]
    if len(broken):
        raise InputError(f"{name} are whole numbers, got {broken[0]:g}")
    return array.astype(np.int64, copy=False)


def _rates(name: str, values: ArrayLike | None, shape: tuple[int, int]) -> NDArray[np.float64]:
    if values is None:
        return np.full(shape, np.nan)
    rates: NDArray[np.float64] = _numbers(name, values).astype(np.float64, copy=False)
    return rates


def _problems(
    norms: Mapping[str, NDArray[np.float32]],
    steps: NDArray[np.int64],
    epochs: NDArray[np.int64],
    by_weight: Mapping[str, NDArray[np.floating]],
) -> Iterator[str]:
    """Yield what is wrong with the shapes and the clock."""
    records = len(steps)
    if len(epochs) != records:
        yield f"{records} steps, but epochs of shape {epochs.shape}"
        return
    for name, values in by_weight.items():
        if values.shape != (records, len(norms)):
            yield f"{name} has shape {values.shape}, expected {(records, len(norms))}"
    for name, values in norms.items():
        if values.ndim != 2 or values.shape[0] != records:
            yield f"{name} has shape {values.shape}, expected ({records}, channels)"
        elif (values < 0).any():
            yield f"{name} has a negative norm in record {int((values < 0).any(1).argmax())}"
    if (np.diff(steps) <= 0).any() or (steps < 0).any():
        yield "its steps do not increase"
    if (np.diff(epochs) < 0).any() or (epochs < 0).any():
        yield "its epochs run backwards"
