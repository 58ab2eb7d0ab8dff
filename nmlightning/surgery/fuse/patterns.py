"""Patterns of a norm followed by a ReLU, or by an addition and a ReLU, and their rewriting."""

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import BuiltinFunctionType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node

from nmlightning.kernels.interface import Fused
from nmlightning.surgery.norm_layers import has_hooks

_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
_ADDITIONS = (operator.add, torch.add, Tensor.add)
_ADDITIONS_IN_PLACE = (operator.iadd, Tensor.add_)
_METHODS = {"relu": F.relu, "relu_": F.relu_, "add": torch.add, "add_": operator.iadd}


@dataclass(frozen=True)
class Site:
    """A norm's call, the calls that it takes over, in order, and what it then does.

    Attributes:
        call: of the norm.
        taken: the calls from the one behind the norm's to that of the ReLU.
        fused: what they come to.
        residual: what is added, where something is.
        in_place: whether that is added to the norm's output, whose dtype then stays.
    """

    call: Node
    taken: tuple[Node, ...]
    fused: Fused
    residual: Node | None = None
    in_place: bool = False


@dataclass
class BlockSites:
    """The sites of one module by the norms' names in it, and why other norms have none."""

    found: dict[str, Site] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def find_sites(graph: Graph, module: nn.Module, wanted: Mapping[str, Fused]) -> BlockSites:
    """Return the sites of norms in the graph of a module, one norm at most for each ReLU.

    Args:
        graph: of the module's forward, with its children as whole calls.
        module: the module.
        wanted: the most that each norm may do, by its name in the module.
    """
    calls = {name: [n for n in graph.nodes if is_call_of(n, name)] for name in wanted}
    sites = BlockSites()
    taken: set[Node] = set()
    for name in sorted(wanted, key=lambda name: _place(graph, calls[name])):
        site = _find_site(calls[name], module, wanted[name])
        if isinstance(site, Site) and not taken.isdisjoint(site.taken):
            site = "what is added to it is a norm's output, too"
        if isinstance(site, Site):
            taken |= {*site.taken}
            sites.found[name] = site
        else:
            sites.refused[name] = site
    return sites


def is_call_of(node: Node, name: str) -> bool:
    """Return whether a node calls the child of that name."""
    return node.op == "call_module" and node.target == name


def _place(graph: Graph, calls: list[Node]) -> tuple[int, int]:
    """Return the order in which norms choose: of two that are added, the one that is added to."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    if not calls:
        return len(order), 0
    users = [user for user in calls[0].users if _is_addition(user)]
    if users and calls[0] is users[0].args[0]:
        return order[calls[0]], 0
    return len(order), 1


def _find_site(calls: list[Node], module: nn.Module, wanted: Fused) -> Site | str:
    if len(calls) != 1:
        return f"it is called {len(calls)} times" if calls else "no forward calls it"
    (call,) = calls
    if len(call.args) + len(call.kwargs) != 1:
        return "it is called with more than its input"
    follower, taken = _follow(call, module)
    if isinstance(follower, str):
        return follower
    if _is_relu(follower, module):
        reason = _refuse_hooks([*taken, follower], module)
        return reason or Site(call, (*taken, follower), "relu")
    if not _is_addition(follower):
        what = "nothing" if follower.op == "output" else _word(follower, module)
        return f"{what} follows it in {type(module).__name__}"
    if wanted != "add_relu":
        return 'an addition follows it, which fuse="add_relu" takes over'
    return _find_addition(call, taken, follower, module)


def _find_addition(call: Node, before: list[Node], add: Node, module: nn.Module) -> Site | str:
    output = before[-1] if before else call
    residual = _other_operand(add, output)
    if residual is None:
        return "what is added to it is no tensor of the same forward, or is scaled"
    in_place = _function(add) in _ADDITIONS_IN_PLACE
    if in_place and add.args[0] is not output:
        return "it is added to another tensor in place"
    relu, between = _follow(add, module)
    if isinstance(relu, str) or not _is_relu(relu, module):
        return "no ReLU follows the addition"
    taken = (*before, add, *between, relu)
    return (
        _refuse_hooks(taken, module)
        or _refuse_to_move(call, add, module)
        or Site(call, taken, "add_relu", residual, in_place)
    )


def _refuse_to_move(call: Node, add: Node, module: nn.Module) -> str:
    """Return why a norm cannot be called as late as its addition, or nothing."""
    source = call.args[0] if call.args else call.kwargs["input"]
    late = call
    while late.next is not add:
        late = late.next
        if late.op == "output" or not isinstance(source, Node):
            return "its input is no tensor of the same forward"
        # It might be changed in between, by another name.
        aliased = source.op != "call_module" or _may_alias(_module(source, module))
        if (aliased or len(source.users) > 1) and not _only_reads(late, module):
            return "its input is used elsewhere before the addition"
    return ""


def _only_reads(node: Node, module: nn.Module) -> bool:
    """Return whether a node is sure to leave its inputs as they are."""
    if node.op == "call_method":
        return not str(node.target).endswith("_")
    if node.op == "call_function" and isinstance(node.target, BuiltinFunctionType):
        name, home = node.target.__name__, node.target.__module__
        in_place = name.endswith("_") or (home == "_operator" and name.startswith("i"))
        return not in_place and "out" not in node.kwargs
    return node.op == "get_attr" or _is_inactive(node, module)


def _may_alias(module: nn.Module) -> bool:
    return hasattr(module, "inplace") or isinstance(module, (nn.Identity, nn.Flatten, nn.Dropout))


def _follow(node: Node, module: nn.Module) -> tuple[Node | str, list[Node]]:
    """Return the one call that takes the output of a node, and the identities before that."""
    passed: list[Node] = []
    while True:
        if len(node.users) != 1:
            return "its output goes to several places" if node.users else "nothing uses it", []
        (user,) = node.users
        if not _is_inactive(user, module):
            return user, passed
        passed.append(user)
        node = user


def _is_inactive(node: Node, module: nn.Module) -> bool:
    return node.op == "call_module" and type(_module(node, module)) is nn.Identity


def _is_relu(node: Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return is_relu(_module(node, module))
    return _function(node) in _RELUS


def is_relu(module: nn.Module) -> bool:
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


def _refuse_hooks(nodes: tuple[Node, ...] | list[Node], module: nn.Module) -> str:
    for node in nodes:
        if node.op == "call_module" and has_hooks(_module(node, module)):
            return f"{node.target} has hooks"
    return ""


def _module(node: Node, module: nn.Module) -> nn.Module:
    return module.get_submodule(str(node.target))


def _word(node: Node, module: nn.Module) -> str:
    if node.op == "call_module":
        return type(_module(node, module)).__name__
    return str(getattr(node.target, "__name__", node.target))


class Code(NamedTuple):
    """The source of a function `forward`, and what its global names stand for; it pickles.

    A name stands for an object, or, of a module, for its name.
    """

    source: str
    names: tuple[tuple[str, Any], ...]
    modules: tuple[tuple[str, str], ...]


def rewrite(graph: Graph, sites: Mapping[str, Site]) -> Code:
    """Return the code of a graph in which the norms do what the sites say; the graph is changed."""
    for site in sites.values():
        _take_over(graph, site)
    for node in graph.nodes:
        node.type = None  # an annotation might be of a class that no other process finds
    code = graph.python_code("self")
    source = code.src.strip() + "\n"
    used = {name: v for name, v in code.globals.items() if re.search(rf"\b{name}\b", source)}
    modules = {name: v.__name__ for name, v in used.items() if isinstance(v, ModuleType)}
    names = {name: v for name, v in used.items() if name not in modules}
    return Code(source, tuple(sorted(names.items())), tuple(sorted(modules.items())))


def _take_over(graph: Graph, site: Site) -> None:
    output = site.call if site.residual is None else _call_late(graph, site, site.residual)
    site.taken[-1].replace_all_uses_with(output)
    for node in reversed(site.taken):
        graph.erase_node(node)
    if output is not site.call:
        graph.erase_node(site.call)


def _call_late(graph: Graph, site: Site, residual: Node) -> Node:
    """Call the norm where the addition was, and return that call."""
    source = site.call.args[0] if site.call.args else site.call.kwargs["input"]
    add = next(node for node in site.taken if residual in node.all_input_nodes)
    with graph.inserting_before(add):
        if site.in_place:  # The sum kept the dtype of the norm's output, which is its input's.
            residual = graph.call_method("type_as", (residual, source))
        return graph.call_module(str(site.call.target), (source, residual))
