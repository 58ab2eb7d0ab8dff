"""The forward of a module whose norms do more: its graph with fewer calls, and that as code."""

import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

from torch.fx import Graph, Node

from nmlightning.fusing.sites import Site


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
