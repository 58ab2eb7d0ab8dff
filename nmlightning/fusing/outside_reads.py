"""What a forward reads besides its arguments and its module's children: a trace would freeze it.

Plain attributes of the module are no harm, since their change is noticed. What can change unnoticed
is: an object that has a state of its own, a global, an attribute of a child, or whatever a function
of somebody else's looks at.
"""

import builtins
import dis
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

# Packages whose functions compute, and keep nothing.
_KNOWN = frozenset(
    {"builtins", "_operator", "operator", "math", "nmlightning", "timm", "torch", "torchvision"}
)
_HARMLESS = frozenset(
    {
        *("abs", "bool", "dict", "enumerate", "float", "getattr", "hasattr", "int", "len", "list"),
        *("max", "min", "range", "reversed", "sorted", "str", "sum", "super", "tuple", "zip"),
    }
)
_LOAD_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")
_PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))
_MODULE_NAMES = frozenset({*dir(nn.Module), *vars(nn.Module())})


def refuse_outside_reads(function: FunctionType, codes: list[CodeType], module: nn.Module) -> str:
    """Return why what a method of a module reads may change unnoticed, or nothing."""
    name = function.__name__
    for variable, cell in zip(
        function.__code__.co_freevars, function.__closure__ or (), strict=True
    ):
        if not isinstance(cell.cell_contents, type):
            return f"its {name} reads {variable}, a variable of a function around it"
    for code in codes:
        instructions = list(dis.get_instructions(code))
        for each, following in zip(instructions, [*instructions[1:], None], strict=True):
            if each.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                reason = _refuse_global(str(each.argval), function)
            elif each.opname == "IMPORT_NAME":
                reason = f"imports {each.argval}"
            elif each.opname in _LOAD_ATTRIBUTE:
                reason = _refuse_attribute(str(each.argval), following, module)
            else:
                reason = ""
            if reason:
                return f"its {name} {reason}"
    return ""


def class_attributes(names: frozenset[str], cls: type[nn.Module]) -> Iterator[str]:
    """Yield which of the names are data that the class has, and not the module itself."""
    for name in names - _MODULE_NAMES:
        value = _of_class(name, cls)
        if value is not None and not callable(value):
            yield name


def _refuse_global(name: str, function: FunctionType) -> str:
    value = function.__globals__.get(name, vars(builtins).get(name))
    if isinstance(value, ModuleType):
        return "" if _is_known(value.__name__) else f"uses the module {name}"
    if not isinstance(value, (type, FunctionType, BuiltinFunctionType)):
        return "" if _is_known(type(value).__module__) and callable(value) else f"reads {name}"
    if vars(builtins).get(name) is value:
        error = isinstance(value, type) and issubclass(value, BaseException)
        return "" if name in _HARMLESS or error else f"calls {name}"
    return "" if _is_known(value.__module__) else f"calls {name}, which may do anything"


def _refuse_attribute(name: str, following: dis.Instruction | None, module: nn.Module) -> str:
    if name in module._modules and following is not None and following.opname in _LOAD_ATTRIBUTE:
        return f"reads {following.argval} of its {name}"
    if name in _MODULE_NAMES:
        return ""
    value = vars(module).get(name, _of_class(name, type(module)))
    if isinstance(value, property):
        return f"reads the property {name}"
    return "" if _is_fixed(value) else f"reads {name}, whose content may change"


def _of_class(name: str, cls: type[nn.Module]) -> Any:
    owners = (o for o in cls.__mro__[: cls.__mro__.index(nn.Module)] if name in vars(o))
    return next((vars(owner)[name] for owner in owners), None)


def _is_fixed(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_fixed, value))
    if isinstance(value, (FunctionType, BuiltinFunctionType, type, staticmethod, classmethod)):
        return True  # what they do is looked at where they are called, or they are torch's
    return isinstance(value, _PLAIN)


def _is_known(package: str | None) -> bool:
    return package is not None and package.split(".")[0] in _KNOWN
