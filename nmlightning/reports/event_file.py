"""The scalars in TensorBoard's event files, whose checksums are compared.

TensorBoard's own reader checks every byte in Python, which takes seconds for a run with pictures.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import google_crc32c
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from nmlightning.errors import InputError


class Point(NamedTuple):
    """One logged number; `time` is in seconds since 1970, NaN where it was not logged."""

    tag: str
    step: int
    value: float
    time: float


def check_regular(file: Path) -> None:
    """Raise InputError for a pipe or a device, which may never end."""
    if file.exists() and not file.is_file():
        raise InputError(f"{file} is not a regular file; remove it from the run.")


def read_event_file(file: Path) -> Iterator[Point]:
    """Yield the scalars. A record that is cut off, as of a run that still writes, is the end."""
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
