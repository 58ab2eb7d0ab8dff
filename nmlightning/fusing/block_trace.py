"""What one module's own forward does with its children, as torch.fx traces it, or why not.

A trace keeps the branches that it went through, and nothing but operations on tensors. So a forward
is refused whose branches may depend on more than the module's own plain attributes, which the trace
reports, or that does more than compute: else the rewritten forward would be another.
"""

import dis
import inspect
import operator
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node, Proxy, Tracer

from nmlightning.fusing.outside_reads import class_attributes, refuse_outside_reads

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
