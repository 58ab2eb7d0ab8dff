"""What a network does with its modules and tensors, as torch.fx traces it."""

import inspect
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node, Tracer
from torch.nn.modules.conv import _ConvNd


class TracedUses:
    """Every call of a module and every use of a tensor, for all inputs that have values only.

    A symbolic trace holds for any values: where the flow of control depends on them, or on a
    shape, there is none.

    Args:
        model: in evaluation.
        whole: modules that are taken as a whole, besides convolutions, linear layers and those of
            torch itself.

    Raises:
        Exception: of any class, from a forward pass that cannot be traced.
    """

    def __init__(self, model: nn.Module, whole: Collection[nn.Module]) -> None:
        self._calls: dict[nn.Module, list[Node]] = defaultdict(list)
        self._module_of: dict[Node, nn.Module] = {}
        self._places: Counter[int] = Counter(
            id(tensor) for module in model.modules() for tensor in own_tensors(module)
        )
        for node in _trace(model, whole).nodes:
            if node.op == "call_module":
                module = self._module_of[node] = model.get_submodule(str(node.target))
                self._calls[module].append(node)
            elif node.op == "get_attr":
                self._places[id(attrgetter(str(node.target))(model))] += 1

    def calls(self, module: nn.Module) -> list[Node]:
        """Return the calls of a module."""
        return self._calls[module]

    def source(self, call: Node) -> tuple[nn.Module | None, Node | None]:
        """Return the module whose output is the input of a call, if one's is, and its call."""
        given = call.args[0] if call.args else call.kwargs.get("input")
        if not isinstance(given, Node):
            return None, None
        return self._module_of.get(given), given

    def shares_tensors(self, module: nn.Module) -> bool:
        """Whether a parameter or buffer of the module is used anywhere else, too."""
        return any(self._places[id(tensor)] > 1 for tensor in own_tensors(module))


def own_tensors(module: nn.Module) -> list[Tensor]:
    """Return a module's own parameters and buffers, without those of its children."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in tensors if tensor is not None]


def name_source(module: nn.Module | None, node: Node | None) -> str:
    """Return a word for what gives an input: a class, a function, or the network's own input."""
    if module is not None:
        return type(module).__name__
    if node is None or node.op == "placeholder":
        return "an input of the network"
    return str(getattr(node.target, "__name__", node.target))


class _Tracer(Tracer):
    def __init__(self, whole: Collection[nn.Module]) -> None:
        super().__init__()
        self._whole = set(whole)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        kept = isinstance(module, (_ConvNd, nn.Linear)) or module in self._whole
        return kept or super().is_leaf_module(module, name)


def _trace(model: nn.Module, whole: Collection[nn.Module]) -> Graph:
    with warnings.catch_warnings():
        # Torch cannot write an assertion for every default; we run no traced graph.
        warnings.filterwarnings("ignore", "Was not able to add assertion")
        return _Tracer(whole).trace(model, concrete_args=_defaults(model))


def _defaults(model: nn.Module) -> dict[str, Any]:
    """Return the arguments that stay at their default: else a None would be traced as a tensor."""
    arguments = inspect.signature(model.forward).parameters.values()
    return {a.name: a.default for a in arguments if a.default is not inspect.Parameter.empty}
