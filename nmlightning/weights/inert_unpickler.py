"""Reads a pickle without running anything that it names."""

import pickle
import pickletools
from collections.abc import Mapping
from io import BytesIO

from nmlightning.errors import InputError

_LONGEST_NAME = 80  # of a global in a message; the longest true one has 54 characters


class StandIn:
    """Takes the place of a library's object: it keeps what the pickle gives it and does nothing.

    Attributes:
        args: what the object would have been made from.
        state: what would have been set on it; None if nothing was.
    """

    args: tuple[object, ...]
    state: object

    def __new__(cls, *args: object) -> "StandIn":
        self = super().__new__(cls)
        self.args = args
        self.state = None
        return self

    def __setstate__(self, state: object) -> None:
        self.state = state


def load_inert(stream: BytesIO, stand_ins: Mapping[str, type[StandIn]]) -> object:
    """Return the object of the next pickle in `stream`, and leave the stream at its end.

    A pickle is a program that may call whatever it names. Here it finds the stand-ins and nothing
    else, so that all it can make is made of them and of Python's plain values. What a pickle asks
    to be stored elsewhere, as `torch.save` does with its data, is left as what it is asked for by.
    Memory stays in proportion to the stream; time need not, for a pickle that is made to be slow.

    Args:
        stream: in memory, where a length beyond the end costs nothing.
        stand_ins: by the dotted names of the globals that they take the place of.

    Raises:
        InputError: any other global; no pickle, or one that is damaged.

    Example:
        >>> load_inert(BytesIO(pickle.dumps({"a": [1.0]})), {})
        {'a': [1.0]}
    """
    try:
        _check_opcodes(stream)
        return _InertUnpickler(stream, stand_ins).load()
    except InputError:
        raise
    # Damage shows as almost any exception: https://docs.python.org/3/library/pickle.html names four
    # and says that there are more.
    except Exception as error:
        raise InputError(f"it is truncated or no pickle ({type(error).__name__})") from error


class _InertUnpickler(pickle.Unpickler):
    def __init__(self, stream: BytesIO, stand_ins: Mapping[str, type[StandIn]]) -> None:
        super().__init__(stream)
        self._stand_ins = stand_ins

    def find_class(self, module_name: str, global_name: str, /) -> type[StandIn]:
        name = f"{module_name}.{global_name}"
        if name not in self._stand_ins:
            raise InputError(f"nmlightning refuses to load {name[:_LONGEST_NAME]!r}")
        return self._stand_ins[name]

    def persistent_load(self, pid: object) -> object:
        return pid


def _check_opcodes(stream: BytesIO) -> None:
    """Raise InputError for what would harm before `find_class` is asked, and rewind.

    Reading the opcodes also finds a length beyond the end before memory of that length is taken.
    """
    begin = stream.tell()
    size = stream.seek(0, 2) - begin
    stream.seek(begin)
    for opcode, argument, _ in pickletools.genops(stream):
        # An extension that this process has unpickled before comes from a cache.
        if opcode.name.startswith("EXT"):
            raise InputError("nmlightning refuses to load an extension of copyreg")
        # The memo is an array: one index of 2^31 takes 32 GiB.
        if opcode.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > size:
            raise InputError("it is damaged: it has more objects than bytes")
    stream.seek(begin)
