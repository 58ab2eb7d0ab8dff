"""Measures how far rounding to few bits turns what a network's layers compute with.

Of a tensor x and x̂, x rounded to a grid, that is the angle arccos ⟨x, x̂⟩ / (‖x‖ ‖x̂‖). Rounded as in
`Int8Layer` are a layer's input, over the mean range of its samples, its weight, over ±max|w|, and
the gradient of its output, over its extremes, where the layer passes one on.

All is rounded to nearest, the gradient too, since the bound is of that. Stochastic rounding turns a
gradient further in each step, by noise that is 0 in the mean of many.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nmlightning.errors import InputError
from nmlightning.int8 import quantizer
from nmlightning.int8.layers import Int8Layer, find_layers
from nmlightning.name_patterns import by_reason, some
from nmlightning.probe.probe import Batch, run_batches
from nmlightning.reports.formatting import Grid, Report
from nmlightning.reports.tags import ROUNDED
from nmlightning.weights.layer_weights import WeightLocation

if TYPE_CHECKING:
    from rich.text import Text

BITS = (8, 4, 2)


def probe_int8(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    bits: Sequence[int] = BITS,
) -> "Directions":
    """Measure how far 8 bits or fewer would turn what a model's layers compute with.

    Every batch goes forward and backward once, in training mode and by the layers as they are. For
    each convolution and linear layer the angle is measured between the input, the weight and the
    output's gradient, and what `Int8Layer` would round them to, all to nearest. A layer loses a
    direction where the angle is beyond that of the bound, 2^b / (2^b + √(ln n / 6)) for n Gaussian
    values. Weights, gradients, buffers, modes and random numbers do not change.

    Args:
        model: any torch model, on any device; its layers may be in int8.
        batches: as `loss` takes them; each is used once.
        loss: called with the model and a batch; returns the scalar to be minimised.
        bits: numbers of bits of 2 … 8 to try.

    Raises:
        InputError: a model without such layers, no batch, or other bits.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> images = torch.randn(4, 3, 16, 16)
        >>> found = probe_int8(net, [images], lambda net, x: net(x).square().mean())
        >>> found.losing_layers(8)
        []

    Source: Banner et al. 2018 (arXiv 1805.11046).
    """
    watch = DirectionWatch(model, bits)
    run_batches(watch, model, batches, loss)
    found = watch.directions()
    if not found.layers:
        others = "; ".join(by_reason(found.left_out))
        raise InputError(
            f"There is no convolution or linear layer to measure in {type(model).__name__}"
            f"{others and f': {others}'}."
        )
    return found


class DirectionWatch:
    """Looks into the layers of a model while any code trains it; a context manager.

    Args:
        model: whose convolutions and linear layers are measured.
        bits: to try; None measures only layers in int8, at their own bits.
        is_due: whether to measure now, asked at each call of a layer.
    """

    def __init__(
        self,
        model: nn.Module,
        bits: Sequence[int] | None = BITS,
        is_due: Callable[[], bool] = lambda: True,
    ) -> None:
        if bits is not None:
            if isinstance(bits, int) or not len(bits):
                raise InputError(f"bits is a list of numbers of 2 … 8, got {bits!r}.")
            bits = list(dict.fromkeys(quantizer.check_bits("bits", each) for each in bits))
        self.bits = bits
        self.layers: dict[str, WatchedLayer] = {}
        self.left_out: dict[str, str] = {}
        seen = set()
        for name, module, reason in find_layers(model):
            if reason:
                self.left_out[name] = f"{type(module).__name__}: {reason}"
            elif module not in seen and (bits or isinstance(module, Int8Layer)):
                self.layers[name] = WatchedLayer(name, module, self.bits, is_due)
            seen.add(module)
        self._hooks = ExitStack()
        self._batches = 0

    def __enter__(self) -> "DirectionWatch":
        for layer in self.layers.values():
            hook = layer.module.register_forward_hook(layer.see, with_kwargs=True)
            self._hooks.callback(hook.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def end_batch(self) -> None:
        """Count a batch."""
        self._batches += 1

    def take_angles(self) -> dict[tuple[str, str], Tensor]:
        """Return the angles by layer and tensor, (B,) degrees on their device, and forget them."""
        found = {}
        for layer in self.layers.values():
            for tensor, cosines in layer.cosines.items():
                found[layer.name, tensor] = cosines.clamp(max=1).acos().rad2deg()
            layer.cosines = {}
        return found

    def directions(self) -> "Directions":
        """Return what was measured so far; InputError without a batch."""
        if not self._batches:
            raise InputError("No batch was run: the data are empty.")
        seen = [layer.directions() for layer in self.layers.values() if layer.cosines]
        unseen = {
            layer.name: f"{type(layer.module).__name__} saw no batch"
            for layer in self.layers.values()
            if not layer.cosines
        }
        return Directions(seen, self.bits or (), self._batches, {**self.left_out, **unseen})


@dataclass
class WatchedLayer:
    """A layer with the lowest cosines of its tensors so far, (B,) float64, for each number of bits.

    Attributes:
        counts: the most values that such a tensor had.
    """

    name: str
    module: Any
    bits: Sequence[int] | None
    is_due: Callable[[], bool]
    cosines: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def see(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        """Forward hook: measure the input and the weight, and wait for the output's gradient."""
        x: Tensor = args[0] if args else kwargs["input"]
        if not (x.numel() and output.numel() and self.is_due()):
            return
        dims = 2 + len(getattr(module, "kernel_size", ()))
        self._measure("input", x if x.dim() >= dims else x.unsqueeze(0))  # one sample is a batch
        if "weight" not in self.cosines:
            place = WeightLocation(module, self.name, "weight")
            self._measure("weight", place.compute() if place.is_computed else self.module.weight)
        rounds = x.requires_grad or not getattr(module, "bifurcate", True)
        if rounds and output.requires_grad:
            output.register_hook(partial(self._measure, "gradient"))  # type: ignore[no-untyped-call, unused-ignore]

    @torch.no_grad()
    def _measure(self, tensor: str, x: Tensor) -> None:
        by_channel = getattr(self.module, "weight_range", "tensor") == "channel"
        if tensor == "weight":
            grids = [quantizer.symmetric_grid(x, bits, by_channel) for bits in self.bits_of(tensor)]
        else:
            if by_channel and tensor == "gradient":  # then what is rounded is s_o · ∂y
                scales = quantizer.symmetric_grid(self.module.weight, 8, True).scale[..., 0]
                x = x * (scales / scales.amax())
            low, high = quantizer.sample_mean(x) if tensor == "input" else quantizer.extreme(x)
            grids = [quantizer.make_grid(low, high, bits) for bits in self.bits_of(tensor)]
        found = torch.stack([quantizer.direction_cosine(x, grid) for grid in grids])
        before = self.cosines.get(tensor, found)
        self.cosines[tensor] = torch.minimum(before, found)  # NaN if either is
        self.counts[tensor] = max(self.counts.get(tensor, 0), x.numel())

    def bits_of(self, tensor: str) -> Sequence[int]:
        """Return the bits to try on a tensor."""
        if self.bits is not None:
            return self.bits
        return [self.module.gradient_bits if tensor == "gradient" else self.module.bits]

    def directions(self) -> "LayerDirections":
        kept = {
            tensor: dict(zip(self.bits_of(tensor), self.cosines[tensor].tolist(), strict=True))
            for tensor in self.cosines
        }
        return LayerDirections(self.name, type(self.module).__name__, kept, dict(self.counts))


@dataclass(frozen=True)
class LayerDirections:
    """One layer, over all calls and batches.

    Attributes:
        name: of the layer in the model.
        type_name: of its class.
        cosines: of "input", "weight" and "gradient", as far as there is one, the lowest for each
            number of bits; NaN where one held inf or NaN.
        counts: how many values the largest of these tensors had.
    """

    name: str
    type_name: str
    cosines: Mapping[str, Mapping[int, float]]
    counts: Mapping[str, int]

    def angle(self, tensor: str, bits: int) -> float:
        """Return how far a tensor is turned, in degrees."""
        return math.degrees(math.acos(min(self.cosines[tensor][bits], 1.0)))

    def bound(self, tensor: str, bits: int) -> float:
        """Return how far Gaussian values may be expected to be turned, in degrees."""
        return math.degrees(math.acos(quantizer.cosine_bound(bits, self.counts[tensor])))

    def loses(self, tensor: str, bits: int) -> bool:
        """Return whether a tensor is turned further than that, or is not finite."""
        return tensor in self.cosines and not self.angle(tensor, bits) <= self.bound(tensor, bits)

    def describe(self, tensor: str, bits: int) -> str:
        """Return `0.6°`, `12°`, `!42°` beyond the bound, or `!NaN`."""
        angle, lost = self.angle(tensor, bits), "!" * self.loses(tensor, bits)
        return "!NaN" if math.isnan(angle) else f"{lost}{angle:.{int(angle < 9.95)}f}°"

    def as_plain(self) -> dict[str, Any]:
        tensors = {
            tensor: {
                "values": self.counts[tensor],
                "degrees": {
                    b: None if math.isnan(c) else self.angle(tensor, b) for b, c in cosines.items()
                },
                "bound": {bits: self.bound(tensor, bits) for bits in cosines},
            }
            for tensor, cosines in self.cosines.items()
        }
        return {"name": self.name, "class": self.type_name, **tensors}


@dataclass(frozen=True, repr=False)
class Directions(Report):
    """All layers of a network; the answer of `nmlightning.probe_int8`.

    It prints as `nm probe` does: the table of the layers, and the verdict.
    """

    layers: Sequence[LayerDirections]  # in the order of the model's modules
    bits: Sequence[int]  # that were tried
    batches: int  # that were run
    left_out: Mapping[str, str]  # layers that were not measured, with the reason

    def losing_layers(self, bits: int, tensors: Sequence[str] = ROUNDED) -> list[LayerDirections]:
        """Return the layers of which any of some tensors is turned beyond the bound."""
        return [each for each in self.layers if any(each.loses(x, bits) for x in tensors)]

    def fewest_bits(self, tensors: Sequence[str]) -> int | None:
        """Return the fewest of the bits that keep some tensors of all layers, as more do."""
        most_first = sorted(self.bits, reverse=True)
        kept = takewhile(lambda bits: not self.losing_layers(bits, tensors), most_first)
        return min(kept, default=None)

    def table(self) -> Grid:
        """Return a row for each layer: by how many degrees each tensor is turned."""
        columns = [self._column(tensor) for tensor in ROUNDED]
        rows = zip((layer.name for layer in self.layers), *columns, strict=True)
        title = f"Degrees turned by rounding to {_list(self.bits)} bits; ! is beyond the bound"
        return Grid(["layer", *ROUNDED], list(rows), title, numbers=True)

    def _column(self, tensor: str) -> list["Text"]:
        """Return a cell for each layer, in which the numbers are below each other."""
        from rich.text import Text

        cells = [
            [layer.describe(tensor, bits) for bits in self.bits if tensor in layer.cosines]
            for layer in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(*filter(None, cells), strict=True)]
        return [
            Text("  ").join(
                Text(text.rjust(width), "red" if "!" in text else "")
                for text, width in zip(cell, widths, strict=True)
            )
            if cell
            else Text("—")
            for cell in cells
        ]

    def describe(self) -> str:
        """Return which layers were not measured and why, and the verdict."""
        left_out = [f"left out    {line}" for line in by_reason(self.left_out, 1)]
        return "\n".join(f" {line}" for line in [*left_out, *self._verdict()])

    def __str__(self) -> str:
        return f"{self.table()}\n\n{super().__str__()}"

    def as_plain(self) -> dict[str, Any]:
        return {
            "bits": list(self.bits),
            "batches": self.batches,
            "left_out": dict(self.left_out),
            "layers": [layer.as_plain() for layer in self.layers],
        }

    def _verdict(self) -> Iterator[str]:
        """Yield what holds no number, what each number of bits loses, and which keeps all."""
        broken = [
            f"the {tensor} of {layer.name}"
            for layer in self.layers
            for tensor, cosines in layer.cosines.items()
            if any(map(math.isnan, cosines.values()))
        ]
        if broken:
            yield f"There is inf or NaN in {some(broken, 2)}: no grid holds that."
            return
        losing = [bits for bits in self.bits if self.losing_layers(bits)]
        if keeping := [bits for bits in self.bits if bits not in losing]:
            yield f"{_list(keeping)} bits keep every direction."
        for bits in losing:
            lost = [(x, t) for x in self.layers for t in ROUNDED if x.loses(t, bits)]
            numbers = [(tensor, sum(t == tensor for _, t in lost)) for tensor in ROUNDED]
            where = ", ".join(f"the {tensor} in {n}" for tensor, n in numbers if n)
            layer, tensor = max(lost, key=lambda each: each[0].angle(each[1], bits))
            yield (
                f"{bits} bits lose the direction of {where} of {len(self.layers)} layers, most in "
                f"{layer.name}: its {tensor} turns by {layer.angle(tensor, bits):.0f}°, the bound "
                f"is {layer.bound(tensor, bits):.0f}°."
            )
        kept = self.fewest_bits(("input", "weight")), self.fewest_bits(("gradient",))
        both, gradient = (bits or "none of these" for bits in kept)
        fewest = f"{both} of inputs and weights, {gradient} of gradients"
        yield f"The fewest bits that keep all: {fewest}."
        yield CAVEAT


CAVEAT = (
    "The bound is what Gaussian values are expected to keep. All was rounded to nearest; rounding "
    "stochastically turns gradients further in a step, by noise that is 0 in the mean of many."
)


def _list(bits: Sequence[int]) -> str:
    *most, last = map(str, bits)
    return f"{', '.join(most)} and {last}" if most else last
