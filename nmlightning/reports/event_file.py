"""The scalars in a TensorBoard event file.

TensorBoard's own reader checks every byte in Python, which takes seconds for a run with pictures;
here records are framed without that, and their messages are parsed by protobuf in C.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from nmlightning.errors import InputError
from nmlightning.reports.series import Point

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
