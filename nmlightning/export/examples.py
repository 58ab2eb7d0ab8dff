"""Inputs that a network is traced and compared with, and its outputs by name."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nmlightning.errors import InputError, check_whole_number
from nmlightning.name_patterns import some

Network = Callable[..., Any]  # called with tensors in order

# One may be special, and the second is that of the export; no batch is fixed then.
BATCH_SIZES = (1, 2, 5)
_BATCH_OF_EXAMPLE = 2  # torch.export would fix a batch of 1
_SEED = 5


def name_outputs(output: Any, name: str = "") -> dict[str, Tensor]:
    """Return the tensors of tuples and mappings by name; other objects, such as caches, are left.

    >>> list(name_outputs({"logits": torch.ones(1), "hidden": (torch.ones(1), None)}))
    ['logits', 'hidden_0']
    """
    if isinstance(output, Tensor):
        return {name or "output": output}
    parts: dict[str, Any] = {}
    if isinstance(output, Mapping):
        parts = {f"{name}.{key}".lstrip("."): value for key, value in output.items()}
    elif isinstance(output, tuple | list):
        parts = {f"{name or 'output'}_{i}": value for i, value in enumerate(output)}
    found = [name_outputs(value, key) for key, value in parts.items()]
    return {key: value for each in found for key, value in each.items()}


class Flattened(nn.Module):
    """A network that takes its keywords in order and returns a tensor or a tuple of some."""

    def __init__(self, net: nn.Module, keywords: Sequence[str]) -> None:
        super().__init__()
        self.net, self.keywords = net, tuple(keywords)

    def forward(self, *inputs: Tensor) -> Any:
        count = len(inputs) - len(self.keywords)
        keywords = dict(zip(self.keywords, inputs[count:], strict=True))
        output = self.net(*inputs[:count], **keywords)
        return output if isinstance(output, Tensor) else tuple(name_outputs(output).values())


def plain_of(net: nn.Module) -> nn.Module:
    """Return the network that may be in a `Flattened`."""
    return net.net if isinstance(net, Flattened) else net


class Examples:
    """Standard normal inputs of a shape, or rows of those that are given, in batches of any size.

    Attributes:
        names: of the inputs, in order.
        output_names: of the tensors that the network returns.
        lengths: the names of dimension 1 of inputs, by theirs, where its size is left open. By
            default `sequence` of those that are as long as all of whole numbers, such as tokens.

    Raises:
        InputError: no such inputs; the network does not take them, or returns no finite tensor.
    """

    def __init__(
        self,
        net: nn.Module,
        input_shape: Sequence[int] | None,
        inputs: Mapping[str, Tensor] | Sequence[Tensor] | None,
        lengths: Mapping[str, str] | None = None,
    ) -> None:
        if inputs is None and not isinstance(input_shape, Sequence):
            raise InputError(
                f"input_shape is a sequence, such as (3, 32, 32), got {input_shape!r}."
            )
        sizes = [check_whole_number("a size of input_shape", n) for n in input_shape or ()]
        self._is_drawn, self._what = not inputs, "the inputs"
        if not inputs:
            self._what = f"inputs of shape {','.join(map(str, sizes))}"
            generator = torch.Generator().manual_seed(_SEED)
            inputs = [torch.randn(max(BATCH_SIZES), *sizes, generator=generator)]
        self._keywords = list(inputs) if isinstance(inputs, Mapping) else []
        given = list(inputs.values() if isinstance(inputs, Mapping) else inputs)
        if not all(x.dim() and x.shape[:1] == given[0].shape[:1] and len(x) for x in given):
            shapes = some([str(tuple(x.shape)) for x in given])
            raise InputError(f"the first dimension of all inputs is the batch; they are {shapes}.")
        self._given = [x.cpu().float() if x.is_floating_point() else x.cpu() for x in given]
        takes = list(inspect.signature(net.forward).parameters)[: len(given)]
        takes = takes if len(takes) == len(given) else [f"input_{i}" for i in range(len(given))]
        self.names = self._keywords or (takes if len(given) > 1 else ["input"])
        tokens = {x.shape[1] for x in given if x.dim() > 1 and not x.is_floating_point()} - {1, 2}
        pairs = zip(self.names, given, strict=True)
        as_long = [name for name, x in pairs if x.dim() > 1 and {x.shape[1]} == tokens]
        self.must_be_open = lengths is not None
        self.lengths = dict.fromkeys(as_long, "sequence") if lengths is None else dict(lengths)
        self.output_names = ["output"]
        for size in BATCH_SIZES:
            self.output_names = list(self._check(net, size))

    @torch.no_grad()
    def _check(self, net: nn.Module, size: int) -> dict[str, Tensor]:
        """Return the outputs by name, or raise InputError."""
        batch = self.draw(size)
        try:
            keywords = dict(zip(self._keywords, batch, strict=False))
            output = net(**keywords) if keywords else net(*batch)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"the network does not take {self._what}: {reason}") from error
        found = name_outputs(output)
        if not found:
            raise InputError(
                f"the network returns a {type(output).__name__}; what can be exported returns "
                "tensors, or tuples or mappings of them."
            )
        if not all(y.isfinite().all() for y in found.values()):
            what = "standard normal " * self._is_drawn + self._what
            raise InputError(
                f"the network's outputs for {what} are not finite: has its training diverged?"
            )
        self._is_plain = not keywords and isinstance(output, Tensor)
        return found

    def adapt(self, net: nn.Module) -> nn.Module:
        """Return a network that takes the inputs in order and returns tensors alone."""
        return net if self._is_plain else Flattened(net, self._keywords).eval()

    def draw(self, size: int = _BATCH_OF_EXAMPLE, cut: int = 0) -> tuple[Tensor, ...]:
        """Return a batch, the same every time; its sequences without their last `cut` tokens."""
        rows = torch.arange(size)
        pairs = [(name, x[rows % len(x)]) for name, x in zip(self.names, self._given, strict=True)]
        cuts = self.lengths if cut else ()
        return tuple(x[:, : x.shape[1] - cut] if name in cuts else x for name, x in pairs)

    def dynamic_shapes(self, is_open: bool, find: bool = False) -> Any:
        """Return what leaves batch and lengths open to `torch.export`, which may `find` bounds."""
        dims: dict[str, Any] = {x: torch.export.Dim(x) for x in {"batch", *self.lengths.values()}}
        opened = [self.lengths.get(name) if is_open else None for name in self.names]
        first, auto = {0: dims["batch"]}, torch.export.Dim.AUTO
        shapes = tuple(first | ({1: auto if find else dims[x]} if x else {}) for x in opened)
        return shapes if self._is_plain else (shapes,)

    def describe(self, is_open: bool) -> str:
        """Return names and sizes, such as `N × 3 × 32 × 32`."""
        lines = []
        for name, x in zip(self.names, self.draw(), strict=True):
            sizes: list[Any] = ["N", *x.shape[1:]]
            if is_open and name in self.lengths:
                sizes[1] = self.lengths[name]
            lines.append(f"{name} " * (not self._is_drawn) + " × ".join(map(str, sizes)))
        return ", ".join(lines)

    @torch.no_grad()
    def run(self, net: nn.Module) -> dict[str, float]:
        """Run all given inputs through a network, as an evaluation that measures nothing."""
        self.adapt(net)(*self.draw(len(self._given[0])))
        return {}

    @torch.no_grad()
    def difference(self, found: Network, expected: Network, is_open: bool = False) -> float:
        """Return max |found(x) − y| / max |y| of all outputs and batches; ∞ for others or NaN."""
        batches = [self.draw(size) for size in BATCH_SIZES]
        batches += [self.draw(cut=1)] if is_open else []
        return max(largest_difference(found(*batch), expected(*batch)) for batch in batches)


def largest_difference(found: Any, expected: Any) -> float:
    """Return max |found − y| / max |y| of all tensors in outputs; ∞ for others or NaN."""
    pairs = list(zip(name_outputs(found).values(), name_outputs(expected).values(), strict=True))
    if any(x.shape != y.shape for x, y in pairs):
        return math.inf
    largest = [
        float((x.double() - y.double()).abs().max()) / (float(y.double().abs().max()) or 1.0)
        for x, y in pairs
    ]
    return math.inf if any(map(math.isnan, largest)) else max(largest)
