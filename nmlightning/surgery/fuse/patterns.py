"""Patterns of a norm followed by a ReLU, or by an addition and a ReLU, and their rewriting."""

import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from nmlightning.kernels.interface import Fused
from nmlightning.surgery.fuse.trace import TracedGraph
from nmlightning.surgery.norm_layers import has_hooks

_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
_ADDITIONS = (operator.add, torch.add, Tensor.add)
_ADDITIONS_IN_PLACE = (operator.iadd, Tensor.add_)
_METHODS = {"relu": F.relu, "relu_": F.relu_, "add": torch.add, "add_": operator.iadd}


@dataclass(frozen=True)
class FusablePattern:
    """A norm's call, the calls that it takes over, in order, and what it then does."""

    call: Node  # of the norm
    taken: tuple[Node, ...]  # the calls from the one behind the norm's to that of the ReLU
    fused: Fused  # what they come to
    residual: Node | None = None  # what is added, where something is
    in_place: bool = False  # whether that is added to the norm's output, whose dtype then stays


def find_patterns(
    traced: TracedGraph, wanted: Mapping[str, Fused]
) -> tuple[dict[str, FusablePattern], dict[str, str]]:
    """Return the pattern of each norm, one at most for each ReLU, and why others have none."""
    calls = {name: traced.calls(traced.root.get_submodule(name)) for name in wanted}
    found: dict[str, FusablePattern] = {}
    reasons: dict[str, str] = {}
    taken: set[Node] = set()
    for name in sorted(wanted, key=lambda name: _rank(traced, calls[name])):
        pattern = _find_pattern(traced, calls[name], wanted[name])
        if isinstance(pattern, str):
            reasons[name] = pattern
        elif not taken.isdisjoint(pattern.taken):
            reasons[name] = "what is added to it is a norm's output, too"
        else:
            taken |= {*pattern.taken}
            found[name] = pattern
    return found, reasons


def _rank(traced: TracedGraph, calls: list[Node]) -> tuple[int, int]:
    """Return the order in which norms choose: of two that are added, the one that is added to."""
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    if not calls:
        return len(order), 0
    users = [user for user in calls[0].users if _is_addition(user)]
    if users and calls[0] is users[0].args[0]:
        return order[calls[0]], 0
    return len(order), 1


def _find_pattern(traced: TracedGraph, calls: list[Node], wanted: Fused) -> FusablePattern | str:
    if len(calls) != 1:
        return f"it is called {len(calls)} times" if calls else "no forward calls it"
    (call,) = calls
    if len(call.args) + len(call.kwargs) != 1:
        return "it is called with more than its input"
    follower, taken = _follow(traced, call)
    if isinstance(follower, str):
        return follower
    if _is_relu(traced, follower):
        reason = _unsupported_hooks(traced, [*taken, follower])
        return reason or FusablePattern(call, (*taken, follower), "relu")
    if not _is_addition(follower):
        what = "nothing" if follower.op == "output" else traced.word_for(follower)
        return f"{what} follows it in {type(traced.root).__name__}"
    if wanted != "add_relu":
        return 'an addition follows it, which fuse="add_relu" takes over'
    return _find_addition(traced, call, taken, follower)


def _find_addition(
    traced: TracedGraph, call: Node, before: list[Node], add: Node
) -> FusablePattern | str:
    output = before[-1] if before else call
    residual = _other_operand(add, output)
    if residual is None:
        return "what is added to it is not a tensor of the same forward, or is scaled"
    in_place = _function(add) in _ADDITIONS_IN_PLACE
    if in_place and add.args[0] is not output:
        return "it is added to another tensor in place"
    relu, between = _follow(traced, add)
    if isinstance(relu, str) or not _is_relu(traced, relu):
        return "no ReLU follows the addition"
    taken = (*before, add, *between, relu)
    return (
        _unsupported_hooks(traced, taken)
        or _unsupported_move(traced, call, add)
        or FusablePattern(call, taken, "add_relu", residual, in_place)
    )


def _unsupported_move(traced: TracedGraph, call: Node, add: Node) -> str:
    """Return why a norm cannot be called as late as its addition, or nothing."""
    source, late = traced.input_of(call), call
    if source is None:
        return "its input is not a tensor of the same forward"
    while late.next is not add:
        late = late.next
        # It might be changed in between, by another name.
        if (_may_alias(traced, source) or len(source.users) > 1) and not _only_reads(traced, late):
            return "its input is used elsewhere before the addition"
    return ""


def _only_reads(traced: TracedGraph, node: Node) -> bool:
    """Return whether a node surely does not change its inputs."""
    if node.op == "call_method":
        return not str(node.target).endswith("_")
    if node.op == "call_function" and isinstance(node.target, BuiltinFunctionType):
        name, home = node.target.__name__, node.target.__module__
        in_place = name.endswith("_") or (home == "_operator" and name.startswith("i"))
        return not in_place and "out" not in node.kwargs
    return node.op == "get_attr" or _is_inactive(traced, node)


def _may_alias(traced: TracedGraph, source: Node) -> bool:
    module = traced.module_of(source)
    aliasing = (nn.Identity, nn.Flatten, nn.Dropout)
    return module is None or hasattr(module, "inplace") or isinstance(module, aliasing)


def _follow(traced: TracedGraph, node: Node) -> tuple[Node | str, list[Node]]:
    """Return the one call that takes the output of a node, and the identities before that."""
    passed: list[Node] = []
    while True:
        if len(node.users) != 1:
            return "its output goes to several places" if node.users else "nothing uses it", []
        (user,) = node.users
        if not _is_inactive(traced, user):
            return user, passed
        passed.append(user)
        node = user


def _is_inactive(traced: TracedGraph, node: Node) -> bool:
    return type(traced.module_of(node)) is nn.Identity


def _is_relu(traced: TracedGraph, node: Node) -> bool:
    return is_relu(traced.module_of(node)) or _function(node) in _RELUS


def is_relu(module: nn.Module | None) -> bool:
    """Return whether a module is torch's own ReLU and nothing else."""
    return type(module) is nn.ReLU and "forward" not in vars(module)


def _is_addition(node: Node) -> bool:
    return _function(node) in (*_ADDITIONS, *_ADDITIONS_IN_PLACE)


def _function(node: Node) -> Any:
    """Return the function that a node calls, or the one that its method is."""
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    return node.target if node.op == "call_function" else None


def _other_operand(add: Node, output: Node) -> Node | None:
    """Return what is added to an output, if it is a tensor, and that is all."""
    operands = [*add.args, *(add.kwargs[k] for k in ("input", "other") if k in add.kwargs)]
    extra = add.kwargs.keys() - {"input", "other"}
    others = [operand for operand in operands if operand is not output]
    if extra or len(operands) != 2 or len(others) != 1 or not isinstance(others[0], Node):
        return None
    return others[0]


def _unsupported_hooks(traced: TracedGraph, nodes: Iterable[Node]) -> str:
    for node in nodes:
        module = traced.module_of(node)
        if module is not None and has_hooks(module):
            return f"{node.target} has hooks"
    return ""


class Code(NamedTuple):
    """The source of a function `forward`, and what its global names stand for; it pickles.

    A name stands for an object, or, of a module, for its name.
    """

    source: str
    names: tuple[tuple[str, Any], ...]
    modules: tuple[tuple[str, str], ...]


def rewrite(traced: TracedGraph, patterns: Iterable[FusablePattern]) -> Code:
    """Return the code of a forward in which the norms do what is fused; its graph is changed."""
    for pattern in patterns:
        _take_over(traced, pattern)
    for node in traced.graph.nodes:
        node.type = None  # an annotation might be of a class that no other process finds
    code = traced.graph.python_code("self")
    source = code.src.strip() + "\n"
    used = {name: v for name, v in code.globals.items() if re.search(rf"\b{name}\b", source)}
    modules = {name: v.__name__ for name, v in used.items() if isinstance(v, ModuleType)}
    names = {name: v for name, v in used.items() if name not in modules}
    return Code(source, tuple(sorted(names.items())), tuple(sorted(modules.items())))


def _take_over(traced: TracedGraph, pattern: FusablePattern) -> None:
    output, residual = pattern.call, pattern.residual
    if residual is not None:
        # The norm is called as late as its addition, where there is what is added.
        source = traced.input_of(pattern.call)
        add = next(node for node in pattern.taken if residual in node.all_input_nodes)
        with traced.graph.inserting_before(add):
            if pattern.in_place:  # The sum kept the dtype of the norm's output and of its input.
                residual = traced.graph.call_method("type_as", (residual, source))
            output = traced.graph.call_module(str(pattern.call.target), (source, residual))
    pattern.taken[-1].replace_all_uses_with(output)
    for node in reversed(pattern.taken):
        traced.graph.erase_node(node)
    if output is not pattern.call:
        traced.graph.erase_node(pattern.call)
