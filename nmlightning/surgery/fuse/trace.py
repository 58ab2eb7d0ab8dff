"""Traces one module's own forward by torch.fx, and refuses what a trace would change.

A trace keeps the branches that it went through, and nothing but operations on tensors. Where these
depend on the module's plain attributes that is no harm: they are reported, and their change is
noticed. What the forward reads of other objects, its children among them, must not change.
"""

import inspect
import operator
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy, Tracer


class TracedGraph:
    """A traced forward: which modules it calls, and what goes from one to another."""

    def __init__(self, graph: Graph, root: nn.Module) -> None:
        self.graph = graph
        self.root = root
        self._calls: dict[nn.Module, list[Node]] = defaultdict(list)
        for node in graph.nodes:
            module = self.module_of(node)
            if module is not None:
                self._calls[module].append(node)

    def calls(self, module: nn.Module) -> list[Node]:
        return self._calls[module]

    def module_of(self, node: Node | None) -> nn.Module | None:
        if node is None or node.op != "call_module":
            return None
        return self.root.get_submodule(str(node.target))

    def input_of(self, call: Node) -> Node | None:
        """Return what goes into the call of a module, unless that is no value of the trace."""
        given = call.args[0] if call.args else call.kwargs.get("input")
        return given if isinstance(given, Node) else None

    def word_for(self, node: Node | None) -> str:
        """Return the class or function that a node calls, or that it is an input."""
        module = self.module_of(node)
        if module is not None:
            return type(module).__name__
        if node is None or node.op == "placeholder":
            return "an input of the network"
        return str(getattr(node.target, "__name__", node.target))

    def shares_tensors(self, module: nn.Module) -> bool:
        """Return whether a parameter or buffer of the module is used anywhere else, too."""
        return any(self._uses[id(tensor)] > 1 for tensor in _own_tensors(module))

    @cached_property
    def _uses(self) -> Counter[int]:
        """The number of modules and reads by name of each tensor, by its id."""
        held = [tensor for module in self.root.modules() for tensor in _own_tensors(module)]
        names = [str(node.target) for node in self.graph.nodes if node.op == "get_attr"]
        return Counter(map(id, (*held, *(attrgetter(name)(self.root) for name in names))))


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


@dataclass(frozen=True)
class BlockTrace:
    """The calls of the children in order, and the plain attributes that the forward read."""

    traced: TracedGraph
    read: frozenset[str]


def trace_block(module: nn.Module, cls: type[nn.Module]) -> BlockTrace | str:
    """Return what `cls.forward` of a module does, or in a few words why that is not known."""
    reason = _unsupported_forward(cls)
    if reason:
        return reason
    try:
        training, read = _trace_in(module, cls, training=True)
        evaluating, _ = _trace_in(module, cls, training=False)
    except _UntracedError as error:
        return str(error)
    except Exception as error:  # whatever a forward raises that is given no tensors
        return f"torch.fx cannot trace its forward: {first_line(error)}"
    if training.python_code("self").src != evaluating.python_code("self").src:
        return "its forward does one thing in training and another in evaluation"
    return BlockTrace(TracedGraph(training, module), read)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class _UntracedError(Exception):
    """A forward did what no graph holds."""


# What a trace answers otherwise than a run, or leaves out.
_ASKED = {
    "autocast": "switches autocast",
    "checkpoint": "computes parts of it again in backward",
    "enable_grad": "switches gradients",
    "inference_mode": "switches gradients",
    "is_autocast_enabled": "checks autocast",
    "is_grad_enabled": "checks for gradients",
    "is_tensor": "checks types",
    "isinstance": "checks types",
    "no_grad": "switches gradients",
    "random": "draws random numbers",
    "set_grad_enabled": "switches gradients",
    "type": "checks types",
}


def _unsupported_forward(cls: type[nn.Module]) -> str:
    """Return why the forward of a class need not be traced, or nothing."""
    if not isinstance(cls.forward, FunctionType):
        return "its forward is not a plain function"
    kinds = inspect.Parameter
    plain = (kinds.POSITIONAL_OR_KEYWORD, kinds.POSITIONAL_ONLY)
    for argument in list(inspect.signature(cls.forward).parameters.values())[1:]:
        if argument.kind not in plain or argument.default is not kinds.empty:
            return f"its forward takes {argument}, which may be given or not"
    for function in _functions(cls):
        name = function.__name__
        if hasattr(function, "__wrapped__"):
            return f"its {name} is decorated"
        for used in _names(function.__code__):
            value = function.__globals__.get(used, len)
            if not callable(value) and not isinstance(value, ModuleType):
                return f"its {name} reads {used}"
            if used in _ASKED:
                return f"its {name} {_ASKED[used]}"
    return ""


def _functions(cls: type[nn.Module]) -> Iterator[FunctionType]:
    """Yield the class's forward, and every method and function of its file that those name."""
    found: list[Any] = [cls.forward]
    seen: set[FunctionType] = set()
    while found:
        function = found.pop()
        if isinstance(function, FunctionType) and function not in seen:
            seen.add(function)
            yield function
            for name in _names(function.__code__):
                found += [
                    vars(owner).get(name) for owner in cls.__mro__[: cls.__mro__.index(nn.Module)]
                ]
                other = function.__globals__.get(name)
                if getattr(other, "__module__", "") == function.__module__:
                    found.append(other)


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names of globals and attributes in a function and those inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


class _InPlaceProxy(Proxy):
    """A proxy that records x += y as that: fx alone records x = x + y."""


def _record(function: Callable[..., Any]) -> Callable[..., Any]:
    def in_place(self: Proxy, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return in_place


for _name in ("iadd", "iand", "ifloordiv", "imul", "ior", "ipow", "isub", "itruediv", "ixor"):
    setattr(_InPlaceProxy, f"__{_name}__", _record(getattr(operator, _name)))


class _BlockTracer(Tracer):
    proxy_buffer_attributes = True

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True

    def proxy(self, node: Node) -> Proxy:
        return _InPlaceProxy(node, self)


def _trace_in(
    module: nn.Module, cls: type[nn.Module], training: bool
) -> tuple[Graph, frozenset[str]]:
    modes, random_numbers = {m: m.training for m in module.modules()}, torch.get_rng_state()
    for child in modes:
        child.training = training
    try:
        with _watching(module, cls) as read, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the forward makes of a proxy
            graph = _BlockTracer().trace(module)
        if not torch.equal(random_numbers, torch.get_rng_state()):
            torch.set_rng_state(random_numbers)
            raise _UntracedError("its forward draws random numbers")
    finally:
        for child, mode in modes.items():
            child.training = mode
    return graph, frozenset(read)


_PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))
_FIXED = (*_PLAIN, FunctionType, BuiltinFunctionType, type)
_MODULE_NAMES = frozenset({*dir(nn.Module), *vars(nn.Module())})


@contextmanager
def _watching(module: nn.Module, cls: type[nn.Module]) -> Iterator[set[str]]:
    """Let the module be of a class, and note which attributes of its own are read.

    Raises:
        _UntracedError: within it, where an attribute is set, or is read whose content may change.
    """
    read: set[str] = set()

    def note(self: nn.Module, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name not in _MODULE_NAMES and getattr(value, "__self__", None) is not self:
            if not _is_fixed(value):
                raise _UntracedError(f"its forward reads {name}, whose content may change")
            read.add(name)
        return value

    def refuse(self: nn.Module, name: str, *value: Any) -> None:
        raise _UntracedError("its forward sets attributes")

    before = type(module)
    members = {"__getattribute__": note, "__setattr__": refuse, "__module__": cls.__module__}
    members["__qualname__"] = f"_Watched.{cls.__qualname__}"  # left out as in `fused_class`
    module.__class__ = type(cls.__name__, (cls,), members)
    try:
        yield read
    finally:
        object.__setattr__(module, "__class__", before)


def _is_fixed(value: Any) -> bool:
    return all(map(_is_fixed, value)) if isinstance(value, tuple) else isinstance(value, _FIXED)
