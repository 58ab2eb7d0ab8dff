"""The scalars in TensorBoard's event files, whose checksums are compared.

TensorBoard's own reader checks every byte in Python, which takes seconds for a run with pictures;
here numpy checks blocks of them, and protobuf parses the messages in C.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from nmlightning.errors import InputError


class Point(NamedTuple):
    """One logged number; `time` is in seconds since 1970, NaN where it was not logged."""

    tag: str
    step: int
    value: float
    time: float


_BLOCK = 64  # bytes that are looked up at once
_ONES = 0xFFFFFFFF


def check_regular(file: Path) -> None:
    """Raise InputError for a pipe or a device, which may never end."""
    if file.exists() and not file.is_file():
        raise InputError(f"{file} is no regular file; remove it from the run.")


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
        raise InputError(f"{file} is damaged, or no event file of TensorBoard.") from error


def _records(content: bytes) -> list[bytes]:
    """Return the records that are whole, or raise ValueError if a checksum is wrong."""
    parts: list[bytes] = []  # a length of 8 bytes, a record, a length, …; each before its checksum
    stored: list[int] = []
    start, size = 0, 8
    while (end := start + size) + 4 <= len(content):
        parts.append(content[start:end])
        stored.append(int.from_bytes(content[end : end + 4], "little"))
        start, size = end + 4, int.from_bytes(parts[-1], "little") if len(parts) % 2 else 8
    if stored != _checksums(parts):
        raise ValueError("a checksum differs")
    return parts[1::2]


def _checksums(messages: Sequence[bytes]) -> list[int]:
    """Return the masked CRC-32C of each message of four bytes and more, as TensorBoard has it.

    Source: RFC 3720, appendix B.4; each byte acts by its value and its distance from the end.
    """
    counts = [-(-max(len(message), 4) // _BLOCK) for message in messages]
    # The sum begins with ones, which is to flip the first bytes; zeros before them change nothing.
    flipped = [(_ONES ^ int.from_bytes(m[:4], "little")).to_bytes(4, "little") for m in messages]
    padded = b"".join(
        (first + message[4:]).rjust(count * _BLOCK, b"\0")
        for first, message, count in zip(flipped, messages, counts, strict=True)
    )
    table, blocks = _checksum_table(), np.frombuffer(padded, np.uint8).reshape(-1, _BLOCK)
    alone: list[int] = []  # the sum of each block
    for few in np.array_split(blocks, len(blocks) // 4096 + 1):
        alone += np.bitwise_xor.reduce(table[np.arange(_BLOCK), few], axis=1).tolist()
    a, b, c, d = table[:4].tolist()  # a sum acts on the next block by its first four bytes
    found, remaining = [], iter(alone)
    for count in counts:
        crc = 0
        for block in islice(remaining, count):
            crc = block ^ a[crc & 255] ^ b[crc >> 8 & 255] ^ c[crc >> 16 & 255] ^ d[crc >> 24]
        crc ^= _ONES
        found.append(((crc >> 15 | crc << 17) + 0xA282EAD8) & _ONES)
    return found


@cache
def _checksum_table() -> NDArray[np.uint32]:
    """Return what a byte adds to the checksum of a block, by its place and value."""
    crc = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        crc = np.where(crc & 1, crc >> 1 ^ np.uint32(0x82F63B78), crc >> 1)
    rows = [crc]
    while len(rows) < _BLOCK:
        rows.append(crc[rows[-1] & 255] ^ rows[-1] >> 8)
    return np.array(rows[::-1])


def _number(value: Summary.Value) -> float | None:
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if value.metadata.plugin_data.plugin_name == "scalars" and len(value.tensor.float_val) == 1:
        return float(value.tensor.float_val[0])
    return None
