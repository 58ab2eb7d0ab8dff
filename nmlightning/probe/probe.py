"""Measures the inputs of norm layers, and what norms in half precision make of them."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nmlightning.errors import InputError
from nmlightning.norms.mean_only import MeanOnlyBatchNorm
from nmlightning.probe.fp16_emulation import HALF_NORMS, OUTCOMES, run_in_fp16
from nmlightning.probe.report import LayerRanges, NormRanges
from nmlightning.surgery.fuse.fuse import unfused
from nmlightning.surgery.norm_layers import find_norm_layers

Batch = Any


def probe_norms(
    model: nn.Module, batches: Iterable[Batch], loss: Callable[[nn.Module, Batch], Tensor]
) -> NormRanges:
    """Measure the inputs of a model's norm layers, and what each norm would lose in half.

    Every batch goes forward and backward once, in training mode. In every batch norm and layer norm
    the range of σ is measured, and L2 op by op, L1, L∞, Top(10) and range, with all their values in
    float16, are tried on the x and the gradients of the layer: see `HALF_NORMS`. Weights,
    gradients, buffers, modes and random numbers do not change.

    Args:
        model: any torch model, on any device.
        batches: as `loss` takes them; each is used once.
        loss: called with the model and a batch; returns the scalar to be minimised.

    Raises:
        InputError: a model without norm layers in training mode, or no batch.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> images = torch.randn(4, 3, 16, 16)
        >>> ranges = probe_norms(net, [images], lambda net, x: net(x).square().mean())
        >>> ranges.layers[0].name
        '1'
    """
    watch = NormWatch(model)
    run_batches(watch, model, batches, loss)
    return watch.ranges()


class Watch(AbstractContextManager[Any], Protocol):
    """Looks into a model while any code trains it."""

    def end_batch(self) -> None:
        """Act on a batch that went forward and backward."""


def run_batches(
    watch: Watch,
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
) -> None:
    """Run every batch forward and backward in training mode, and leave the model as it was."""
    with as_it_was(model), watch:
        model.train()
        for batch in batches:
            value = loss(model, batch)
            if value.requires_grad:
                torch.autograd.backward(value)
            watch.end_batch()


class NormWatch:
    """Looks into the norm layers of a model while any code trains it; a context manager.

    `end_batch` is to be called after each backward, and `ranges` returns what was seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self.left_out: dict[str, str] = {}
        self._model = model
        self._layers: dict[int, _WatchedLayer] = {}
        for found in find_norm_layers(model):
            if isinstance(found.module, MeanOnlyBatchNorm):
                self.left_out[found.name] = f"{found.type_name} has no scale"
            elif not isinstance(found.module, _BatchNorm | nn.LayerNorm):
                reason = "is neither a batch norm nor a layer norm"
                self.left_out[found.name] = f"{found.type_name} {reason}"
            elif id(found.module) not in self._layers:
                kind = "batch" if isinstance(found.module, _BatchNorm) else "layer"
                norm = MeasuredNorm(found.name, found.type_name, kind, float(found.module.eps))
                self._layers[id(found.module)] = _WatchedLayer(found.module, norm)
        self._hooks = ExitStack()
        self._batches = 0

    def __enter__(self) -> "NormWatch":
        self._hooks.enter_context(unfused(self._model))  # the gradients are to be a norm's own
        for layer in self._layers.values():
            hook = layer.module.register_forward_hook(layer.see, with_kwargs=True)
            self._hooks.callback(hook.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def end_batch(self) -> None:
        """Count a batch, and judge by the forward alone the layers that got no gradient."""
        self._batches += 1
        for layer in self._layers.values():
            layer.end_batch()

    def ranges(self) -> NormRanges:
        """Return what was measured in the batches so far; InputError if that is nothing."""
        norms = [layer.norm for layer in self._layers.values()]
        where = f"batch or layer norm to measure in {type(self._model).__name__}"
        return gather_ranges(
            norms, self.left_out, where, self._batches, tuple(HALF_NORMS), " in training mode"
        )


@dataclass
class MeasuredNorm:
    """A norm of any kind with what was measured of it."""

    name: str
    type_name: str
    kind: str
    eps: float
    values: int = 0
    offset: float = 0.0
    largest: float = 0.0
    scales: list[Tensor] = field(default_factory=list)
    deviations: list[Tensor] = field(default_factory=list)
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    held: dict[str, Mapping[str, float]] = field(default_factory=dict)

    def measure(self, rows: Tensor, mean: Tensor, variance: Tensor | None = None) -> None:
        """Note what (R, n) rows are, of which (R, 1) means are subtracted."""
        deviations = rows - mean
        variance = deviations.square().mean(1) if variance is None else variance[:, 0]
        scale = variance.sqrt()
        self.values = rows.shape[1]
        self.scales.append(scale)
        self.deviations.append(deviations.abs().amax(1))
        offsets = torch.where(scale > 0, mean[:, 0].abs() / scale, 0.0)
        self.offset = max(self.offset, float(offsets.nan_to_num(0.0, 0.0).max()))
        self.largest = max(self.largest, float(rows.abs().nan_to_num(0.0, 0.0, 0.0).max()))

    def count(self, tried: Mapping[str, Tensor]) -> None:
        """Note what became of the rows."""
        for norm, outcomes in tried.items():
            counts = torch.bincount(outcomes.long(), minlength=len(OUTCOMES)).tolist()
            names = dict(zip(OUTCOMES, counts, strict=True))
            self.outcomes.setdefault(norm, Counter()).update(names)

    def ranges(self) -> LayerRanges:
        """Return what was measured so far."""
        joined = {x: torch.cat(getattr(self, x)).cpu().numpy() for x in ("scales", "deviations")}
        return LayerRanges(**{**vars(self), **joined})


def gather_ranges(
    norms: Sequence[MeasuredNorm], left_out: Mapping[str, str], where: str, batches: int,
    tried: tuple[str, ...], when: str = "",
) -> NormRanges:  # fmt: skip
    """Return what was measured; InputError if there were no norms, no batches, or neither met."""
    if not norms:
        others = "; ".join(dict.fromkeys(left_out.values()))
        raise InputError(f"There is no {where}{others and f': {others}'}.")
    if not batches:
        raise InputError("No batch was run: the data are empty.")
    seen = [norm.ranges() for norm in norms if norm.scales]
    if not seen:
        frozen = ": are all of them frozen?" if when else "."
        raise InputError(f"No norm layer saw a batch{when}{frozen}")
    unseen = {x.name: f"{x.type_name} saw no batch{when}" for x in norms if not x.scales}
    return NormRanges(seen, tried, batches, {**left_out, **unseen})


@dataclass
class _WatchedLayer:
    """A norm layer that a watch looks into."""

    module: nn.Module
    norm: MeasuredNorm
    waiting: list[Tensor] = field(default_factory=list)  # inputs whose gradients are to come

    def see(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        """Forward hook: measure the input, and wait for the gradient of the output."""
        input = (args[0] if args else kwargs["input"]).detach()
        rows = self._rows(input)
        if not module.training or rows.shape[1] < 2 or not rows.numel():
            return
        self.norm.measure(rows, rows.mean(1, keepdim=True))
        self.waiting.append(input)
        if output.requires_grad:
            output.register_hook(partial(self._judge, input))  # type: ignore[no-untyped-call, unused-ignore]

    def end_batch(self) -> None:
        """Judge the calls that got no gradient."""
        for input in list(self.waiting):
            self._judge(input, None)

    def _rows(self, tensor: Tensor) -> Tensor:
        """Return (C, n): a row for all that shares a mean and a scale."""
        if self.norm.kind == "batch":
            return tensor.transpose(0, 1).flatten(1).float()
        sizes: tuple[int, ...] = self.module.normalized_shape  # type: ignore[assignment]
        return tensor.reshape(-1, math.prod(sizes)).float()

    @torch.no_grad()
    def _judge(self, input: Tensor, gradient: Tensor | None) -> None:
        """Try the norms on what the layer got; the hook on the gradient of its output."""
        self.waiting = [each for each in self.waiting if each is not input]
        weight: Tensor | None = self.module.weight  # type: ignore[assignment]
        if gradient is not None and weight is not None and self.norm.kind == "layer":
            gradient = gradient * weight  # a batch norm's is a factor that a row shares
        slopes = None if gradient is None else self._rows(gradient)
        norms = [name for name, norm in HALF_NORMS.items() if self.norm.kind in norm.kinds]
        with torch.autocast(input.device.type, enabled=False):
            self.norm.count(run_in_fp16(self._rows(input), slopes, self.norm.eps, norms))


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Give back buffers, gradients, modes and the state of random numbers after the body."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    for parameter, _ in gradients:
        parameter.grad = None
    with torch.random.fork_rng(sorted(device.index for device in devices)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for module, training in modes:
                module.training = training
