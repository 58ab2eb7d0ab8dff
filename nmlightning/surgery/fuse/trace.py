"""Traces one module's own forward by torch.fx, and refuses what a trace would freeze.

Plain attributes of the module are no harm, since their change is noticed. What can change unnoticed
is: an object that has a state of its own, a global, an attribute of a child, or whatever a function
of somebody else's looks at.

A trace keeps the branches that it went through, and nothing but operations on tensors. So a forward
is refused whose branches may depend on more than the module's own plain attributes, which the trace
reports, or that does more than compute: else the rewritten forward would be another.
"""

import builtins
import dis
import inspect
import operator
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node, Proxy, Tracer

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


# What a forward may ask for and a trace cannot tell, or what it would leave out.
_ASKED = {
    "autocast": "switches autocast",
    "checkpoint": "computes parts of it again in backward",
    "is_autocast_enabled": "asks for autocast",
    "is_grad_enabled": "asks for gradients",
    "is_tensor": "asks for types",
    "isinstance": "asks for types",
    "random": "draws random numbers",
    "set_grad_enabled": "switches gradients",
}
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_IN_PLACE = {
    f"__{name}__": getattr(operator, name)
    for name in ("iadd", "iand", "ifloordiv", "imul", "ior", "ipow", "isub", "itruediv", "ixor")
}


@dataclass(frozen=True)
class BlockTrace:
    """The calls of the children in order, and the plain attributes that the forward read."""

    graph: Graph
    read: frozenset[str]


def trace_block(module: nn.Module, cls: type[nn.Module]) -> BlockTrace | str:
    """Return what `cls.forward` of a module does, or in a few words why nobody can tell."""
    reason = _refuse_forward(cls, module)
    if reason:
        return reason
    try:
        (training, read), (evaluating, _) = (_trace_in(module, cls, mode) for mode in (True, False))
    except _SideEffectError as error:
        return str(error)
    except Exception as error:  # whatever a forward raises that is given no tensors
        lines = str(error).splitlines() or [type(error).__name__]
        return f"torch.fx cannot trace its forward: {lines[0]}"
    if _code(training) != _code(evaluating):
        return "its forward does one thing in training and another in evaluation"
    named = {
        name for f in _functions(cls) for code in _nested(f.__code__) for name in code.co_names
    }
    return BlockTrace(training, read.union(class_attributes(frozenset(named), cls)))


class _SideEffectError(Exception):
    """A forward did what no graph holds."""


def _code(graph: Graph) -> str:
    return graph.python_code("self").src


def _refuse_forward(cls: type[nn.Module], module: nn.Module) -> str:
    """Return why nobody need try to trace the forward of a class, or nothing."""
    if not isinstance(cls.forward, FunctionType):
        return "its forward is no plain function"
    kinds = inspect.Parameter
    plain = (kinds.POSITIONAL_OR_KEYWORD, kinds.POSITIONAL_ONLY)
    for argument in list(inspect.signature(cls.forward).parameters.values())[1:]:
        if argument.kind not in plain or argument.default is not kinds.empty:
            return f"its forward takes {argument}, which may be given or not"
    for function in _functions(cls):
        if hasattr(function, "__wrapped__"):
            return f"its {function.__name__} is decorated"
        for code in _nested(function.__code__):
            asked = next((_ASKED[name] for name in code.co_names if name in _ASKED), "")
            if asked:
                return f"its {function.__name__} {asked}"
            if any(i.opname == "WITH_EXCEPT_START" for i in dis.get_instructions(code)):
                return f"its {function.__name__} has a with statement"
        reason = refuse_outside_reads(function, [*_nested(function.__code__)], module)
        if reason:
            return reason
    return ""


def _functions(cls: type[nn.Module]) -> Iterator[FunctionType]:
    """Yield the class's forward, and every method of it that those may call."""
    names, seen = ["forward"], set()
    while names:
        name = names.pop()
        for owner in cls.__mro__[: cls.__mro__.index(nn.Module)]:
            function = vars(owner).get(name)
            if isinstance(function, FunctionType) and function not in seen:
                seen.add(function)
                yield function
                names += [n for code in _nested(function.__code__) for n in code.co_names]


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


class _InPlaceProxy(Proxy):
    """A proxy that records x += y as that: fx alone takes it for x = x + y."""


def _record(function: Callable[..., Any]) -> Callable[..., Any]:
    def in_place(self: Proxy, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return in_place


for _name, _function in _IN_PLACE.items():
    setattr(_InPlaceProxy, _name, _record(_function))


class _BlockTracer(Tracer):
    proxy_buffer_attributes = True

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True

    def proxy(self, node: Node) -> Proxy:
        return _InPlaceProxy(node, self)


def _trace_in(
    module: nn.Module, cls: type[nn.Module], training: bool
) -> tuple[Graph, frozenset[str]]:
    with _in_mode(module, training), _as_it_was(module), _watching(module, cls) as read:
        random_numbers = torch.get_rng_state()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the forward makes of a proxy
            graph = _BlockTracer().trace(module)
        if not torch.equal(random_numbers, torch.get_rng_state()):
            torch.set_rng_state(random_numbers)
            raise _SideEffectError("its forward draws random numbers")
    return graph, frozenset(read)


@contextmanager
def _in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    before = [(child, child.training) for child in module.modules()]
    for child, _ in before:
        child.training = training
    try:
        yield
    finally:
        for child, mode in before:
            child.training = mode


@contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """Give the module its attributes back, and refuse a forward that changed any."""
    attributes = vars(module)
    before = dict(attributes)
    inside = {name: value.copy() for name, value in before.items() if type(value) in (dict, list)}
    try:
        yield
    finally:
        same = attributes.keys() == before.keys() and all(
            attributes[name] is value for name, value in before.items()
        )
        attributes.clear()
        attributes.update(before)
        for name, value in inside.items():
            same = _give_back(before[name], value) and same
    if not same:
        raise _SideEffectError("its forward sets attributes")


def _give_back(container: Any, before: Any) -> bool:
    """Make a list or dict what it was, and return whether it was that still."""
    items, old = (list(c.items()) if isinstance(c, dict) else c for c in (container, before))
    same = len(items) == len(old) and all(
        a is b or (type(a) is tuple and a[0] == b[0] and a[1] is b[1])
        for a, b in zip(items, old, strict=True)
    )
    if not same and isinstance(container, dict):
        container.clear()
        container.update(before)
    elif not same:
        container[:] = before
    return same


@contextmanager
def _watching(module: nn.Module, cls: type[nn.Module]) -> Iterator[set[str]]:
    """Let the module be of a class, and note which of its attributes are read, but for torch's."""
    read: set[str] = set()

    def note(self: nn.Module, name: str) -> Any:
        if name not in _MODULE_ATTRIBUTES and name in object.__getattribute__(self, "__dict__"):
            read.add(name)
        return object.__getattribute__(self, name)

    before = type(module)
    members = {"__getattribute__": note, "__module__": cls.__module__}
    module.__class__ = type(cls.__name__, (cls,), members)
    try:
        yield read
    finally:
        module.__class__ = before
