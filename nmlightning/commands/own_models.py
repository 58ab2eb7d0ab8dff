"""Models of the user's own, as `my.package:make_model`, and examples of what they take."""

import argparse
import inspect
import re
import zipfile
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nmlightning.errors import InputError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn


def is_own_model(name: str) -> bool:
    """Return whether a word of the command line is `module:name`, and no file or address."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name) is not None


def load_model(name: str) -> "nn.Module":
    """Return the module that `module:name` is or, called without arguments, returns, in evaluation.

    The current folder is searched last, as for configs.

    Raises:
        InputError: no such module or name; it raised an exception; it is no nn.Module.
    """
    from torch import nn

    path, _, attribute = name.partition(":")
    try:
        found = import_module(path)
    except Exception as error:
        line = f"importing {path} raised {_in_line(error)}"
        if isinstance(error, ModuleNotFoundError) and f"{path}.".startswith(f"{error.name}."):
            where = f"installed or in {Path.cwd()}"
            line = f"there is no module {path!r}, {where}, to take {attribute} from."
        raise InputError(line) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            there = [x for x in dir(found) if _is_local(getattr(found, x, None), path)]
            raise InputError(f"{path} has no {attribute!r}.{nearest(part, there)}")
        found = getattr(found, part)
    try:
        net = found() if callable(found) and not isinstance(found, nn.Module) else found
    except Exception as error:
        raise InputError(f"{name} raised {_in_line(error)}") from error
    if not isinstance(net, nn.Module):
        raise InputError(f"{name} gives a {type(net).__name__}, and not an nn.Module.")
    return net.eval()


def _is_local(value: object, path: str) -> bool:
    """Return whether a value is an nn.Module, or callable and of the module's own package."""
    defined = f"{getattr(value, '__module__', '')}."
    own = hasattr(value, "named_parameters") or defined.startswith(f"{path.partition('.')[0]}.")
    return callable(value) and own


def _in_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def read_arrays(file: Path) -> dict[str, NDArray[np.generic]]:
    """Return the arrays of an .npz by name, in their order, or raise InputError."""
    if not file.is_file():
        raise InputError(f"--inputs: there is no file {str(file)!r} in {Path.cwd()}.")
    try:
        with np.load(file) as loaded:
            arrays = dict(loaded)
    except (ValueError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise InputError(
            f"--inputs: {str(file)!r} cannot be read as an .npz of numbers, as np.savez writes it."
        ) from error
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise InputError(f"--inputs: {name!r} of {str(file)!r} is {array.dtype}, no numbers.")
    if not arrays:
        raise InputError(f"--inputs: {str(file)!r} holds no array.")
    return arrays


def bind_inputs(
    net: "nn.Module", arrays: dict[str, NDArray[np.generic]]
) -> "dict[str, Tensor] | tuple[Tensor, ...]":
    """Return arrays as arguments of a network: by name if forward has such, else in order.

    Floating-point arrays become float32; InputError if forward takes other arguments.
    """
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    tensors = {n: q.float() if q.is_floating_point() else q for n, q in tensors.items()}
    signature = inspect.signature(net.forward)
    takes, kind = signature.parameters, type(net).__name__
    by_name = any(name in takes for name in tensors)
    for name in tensors if by_name else ():
        if name not in takes:
            raise InputError(
                f"--inputs: {kind} takes {', '.join(takes)}, and no {name!r}.{nearest(name, takes)}"
            )
    try:
        signature.bind(**tensors) if by_name else signature.bind(*tensors.values())
    except TypeError as error:
        raise InputError(
            f"--inputs has {', '.join(arrays)}, and {kind} takes {', '.join(takes)}: {error}."
        ) from error
    return tensors if by_name else tuple(tensors.values())


def parse_shape(text: str) -> tuple[int, ...]:
    """Return the sizes in a text such as `3,32,32`, for argparse."""
    sizes = text.split(",")
    if not all(size.strip().isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"give sizes such as 3,32,32, got {text!r}")
    return tuple(map(int, sizes))
