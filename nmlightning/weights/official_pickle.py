"""The norms that the authors' own code records, `*.conv_norms.pkl`, read as data.

https://github.com/eladhoffer/norm_matters, in normmatters_wd: with --save_conv_channels_norms the
trainer pickles a dict of pandas.Series, one for each convolution's weight, under a key that ends in
that parameter's index; entry e of a series is a torch.FloatTensor (C,) of the channels' norms. They
are taken after the training and the test of epoch e, from 0 (`NNTrainer.train_epochs`, the probes
at "post_test_forward"), so they are those of the epoch's end.

Neither pandas nor torch is needed: both would run what the file names. `torch.load` with
`weights_only=True` would do for the tensors, but they are few lines to read, and this way there is
one gate to guard, and reading a history needs no torch.
"""

import pickle
import pickletools
import re
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmlightning.errors import InputError, check_whole_number

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


_KEY = re.compile(r"channels_norm_conv_w_norm_per_channel_layer([0-9]{1,9})")


class _Series(StandIn):
    """state: {"_mgr", in pandas 0.22 "_data": manager, ...}"""


class _Manager(StandIn):
    """state: ([index], [values], ...)"""


class _Index(StandIn):
    """args: (class, {"start": ..., "stop": ..., "step": ...})"""


class _Array(StandIn):
    """state: (version, shape, dtype, is_fortran, entries)"""


class _Tensor(StandIn):
    """args: (storage, offset, size, stride, ...)"""


class _FloatStorage(StandIn):
    """args: ([a float for each element],)"""


class _SavedStorage(StandIn):
    """args: (what torch.save wrote,)"""


class _Unread(StandIn):
    """What says nothing about the norms."""


# What pickle writes by default: protocol 3 until Python 3.7, then 4, then 5.
_STAND_INS: Mapping[str, type[StandIn]] = {
    "builtins.slice": _Unread,
    "collections.OrderedDict": _Unread,
    "numpy._core.multiarray._reconstruct": _Array,  # numpy 2
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy.dtype": _Unread,
    "numpy.ndarray": _Unread,
    "pandas.RangeIndex": _Unread,  # pandas 3
    "pandas.Series": _Series,  # pandas 3
    "pandas.core.indexes.base._new_Index": _Index,
    "pandas.core.indexes.range.RangeIndex": _Unread,
    "pandas.core.internals.SingleBlockManager": _Manager,  # pandas 0.22, the authors'
    "pandas.core.internals.managers.SingleBlockManager": _Manager,
    "pandas.core.series.Series": _Series,
    "torch.FloatStorage": _FloatStorage,
    "torch._utils._rebuild_tensor": _Tensor,  # torch 0.3, the authors'
    "torch._utils._rebuild_tensor_v2": _Tensor,
    "torch.storage._load_from_bytes": _SavedStorage,  # since torch 0.4.1
}


def read_official_pickle(
    file: Path, names: Mapping[int, str], steps_per_epoch: int
) -> dict[str, Any]:
    """Return what `NormHistory` is made of, or raise InputError.

    Args:
        file: the authors' `*.conv_norms.pkl`.
        names: the names of its parameters here, by their index there.
        steps_per_epoch: optimizer steps in an epoch of that run, at least 1.
    """
    check_whole_number("steps_per_epoch", steps_per_epoch)
    if not file.is_file():
        raise InputError(f"There is no pickle of the norms of convolutions at {file}.")
    try:
        norms = _rename(_read_norms(file), names)
    except InputError as error:
        raise InputError(f"{file} cannot be used: {error}.") from error
    records = len(next(iter(norms.values())))
    epochs = np.arange(records, dtype=np.int64)
    unknown = np.full((records, len(norms)), np.nan)
    return {
        "norms": norms,
        "steps": (epochs + 1) * steps_per_epoch,
        "epochs": epochs,
        "learning_rates": unknown,
        "weight_decays": unknown,
        "provenance": {"official_pickle": file.name},
    }


def _rename(norms: Mapping[int, NDArray[np.float32]], names: Mapping[int, str]) -> dict[str, Any]:
    """Return the norms by name."""
    held = f"it holds the norms of the parameters {', '.join(map(str, norms))}"
    missing = next((index for index in norms if index not in names), None)
    if missing is not None:
        raise InputError(f"{held}, and names has no {missing}")
    renamed = {names[index]: values for index, values in norms.items()}
    if len(renamed) < len(norms):
        raise InputError(f"{held}, and names gives two of them the same name")
    return renamed


def _read_norms(file: Path) -> dict[int, NDArray[np.float32]]:
    """Return the (T, C) norms of each parameter, by its index."""
    content = load_inert(BytesIO(file.read_bytes()), _STAND_INS)
    if not isinstance(content, dict) or not content:
        raise InputError("it holds no dict of norms; did the run have --save_conv_channels_norms?")
    return {_index(key): _series_values(series, _index(key)) for key, series in content.items()}


def _index(key: object) -> int:
    found = _KEY.fullmatch(key) if isinstance(key, str) else None
    if not found:
        raise InputError("it has another key than channels_norm_conv_w_norm_per_channel_layer<i>")
    return int(found[1])


def _series_values(series: object, index: int) -> NDArray[np.float32]:
    """Return the (T, C) norms in a pandas.Series of dtype object."""
    match series:
        case _Series(state={"_mgr": manager}) | _Series(state={"_data": manager}):
            pass
        case _:
            raise InputError(f"parameter {index} has no pandas.Series")
    match manager:
        case _Manager(
            state=(
                [_Index(args=(_, {"start": 0, "step": 1}))],
                [_Array(state=(_, _, _, _, [_, *_] as entries))],
                *_,
            )
        ):
            rows = [_tensor_values(entry, index) for entry in entries]
        case _:
            raise InputError(f"the series of parameter {index} does not count epochs from 0")
    if len({row.shape for row in rows}) > 1:
        raise InputError(f"the number of channels of parameter {index} changes between epochs")
    return np.stack(rows)


def _tensor_values(tensor: object, index: int) -> NDArray[np.float32]:
    """Return the (C,) elements of a tensor."""
    match tensor:
        case _Tensor(args=(storage, int(offset), (int(count),), (1,), *_)):
            values = _storage_values(storage)
            if 0 <= offset < offset + count <= len(values):
                return values[offset : offset + count]
    raise InputError(f"an entry of parameter {index} is no torch.FloatTensor of shape (channels,)")


def _storage_values(storage: object) -> NDArray[np.float32]:
    """Return all elements of a storage, or none if it is no storage of float32."""
    match storage:
        case _FloatStorage(args=([*values],)) if all(isinstance(v, float) for v in values):
            with np.errstate(over="ignore"):  # it becomes infinite, and the history is refused
                return np.array(values, dtype=np.float32)
        case _SavedStorage(args=(bytes(content),)):
            return _saved_values(content)
    return np.empty(0, dtype=np.float32)


def _saved_values(content: bytes) -> NDArray[np.float32]:
    """Return the elements of the one storage that torch.save wrote in its format before 1.6.

    That is five pickles (magic number, version, system, object, keys of the storages), then for
    each storage the number of elements, int64, and the elements, little-endian as both.
    https://github.com/pytorch/pytorch/blob/v2.11.0/torch/serialization.py, `_legacy_save`
    """
    stream = BytesIO(content)
    match [load_inert(stream, _STAND_INS) for _ in range(5)]:
        case [_, _, _, ("storage", kind, *_), [_]] if kind is _FloatStorage:
            count = int.from_bytes(stream.read(8), "little")
            elements = stream.read()
            if len(elements) == 4 * count:
                return np.frombuffer(elements, dtype="<f4").astype(np.float32)
    return np.empty(0, dtype=np.float32)
