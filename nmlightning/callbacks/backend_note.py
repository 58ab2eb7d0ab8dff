"""Which backend the norms of a model really take in training, found out in a forward pass."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from nmlightning.norms.kernels.dispatch import Choice
from nmlightning.norms.kernels.layout import layout_of
from nmlightning.norms.serving import choice_for

Answer = tuple[str, Choice, str]
"""A layer's class, who computes it, and the dtype and layout of what it got."""


class BackendNote:
    """Asks each norm once, when it gets its first batch, who computes it.

    A network that is compiled in whole or in part is not asked, since a hook would be traced.

    Args:
        model: what is trained.
        layers: its norms, by name.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self._answers: dict[nn.Module, Answer] = {}
        self._handles: list[RemovableHandle] = []
        self._compiled = any(map(_is_compiled, model.modules()))
        if not self._compiled:
            self._handles = [layer.register_forward_pre_hook(self._ask) for layer in self._modules]

    @property
    def _modules(self) -> set[nn.Module]:
        return set(self._layers.values())

    def describe(self) -> list[str]:
        """Return a line for each backend, class, dtype and layout, and ask no more."""
        for handle in self._handles:
            handle.remove()
        if self._compiled:
            classes = Counter(type(layer).__name__ for layer in self._modules)
            return [f"{n} {name} by the formula, compiled" for name, n in classes.items()]
        return [_line(*answer, count) for answer, count in Counter(self._answers.values()).items()]

    def _ask(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if layer not in self._answers and inputs:
            x = inputs[0]
            what = f"{str(x.dtype).removeprefix('torch.')}, {_layout_word(x)}"
            self._answers[layer] = (type(layer).__name__, choice_for(layer, x), what)


def _line(name: str, choice: Choice, what: str, count: int) -> str:
    if choice.kernels is None:
        return f"{count} {name} by the formula ({what}): {choice.reason}"
    return f"{count} {name} by {choice.backend} kernels ({what})"


def _layout_word(x: Any) -> str:
    layout = layout_of(x)
    if layout == "other":
        return "strided"
    return layout if x.dim() > 3 else "contiguous"


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
