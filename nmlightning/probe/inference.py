"""Measures what the norms of an evaluated model get, and what half precision makes of it."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from nmlightning.errors import InputError
from nmlightning.export.fold import folded_weights
from nmlightning.export.onnx_norms import LEFT, OnnxNorm, find_onnx_norms
from nmlightning.export.onnx_values import OnnxFile, attribute_of
from nmlightning.norms.batch_norm_base import RUNNING
from nmlightning.norms.layer_norm import LpLayerNorm, LpRMSNorm
from nmlightning.norms.mean_only import MeanOnlyBatchNorm
from nmlightning.norms.scaled import Scaled
from nmlightning.probe.fp16_emulation import FORMS, KINDS, RowNorm, judge, run_forms
from nmlightning.probe.probe import MeasuredNorm, as_it_was, gather_ranges
from nmlightning.probe.report import DTYPES, NormRanges
from nmlightning.surgery.foreign_norms import NormForm, find_form
from nmlightning.surgery.fuse.fuse import unfused
from nmlightning.surgery.norm_layers import NormLayer, find_norm_layers

_CLASSES = {nn.GroupNorm: "group", _InstanceNorm: "instance", _BatchNorm: "batch"}
_FLOAT32_EPS = torch.finfo(torch.float32).eps  # what torch's RMS norm adds by default
_AT_ONCE = 8  # norms of a file whose inputs are held


def probe_inference(model: nn.Module | str | Path | OnnxFile, batches: Iterable[Any]) -> NormRanges:
    """Measure what an evaluated model's norms get, and what float16 and bfloat16 make of it.

    Every batch goes forward once, in evaluation. Of the rows that each layer, RMS, instance, group
    and batch norm normalises, |x| and σ are measured, and the norm is then run on them in half, op
    by op (see `FORMS`): by its squares, summed in float32 or in half; in the scaled form; by L1.
    Of a batch norm its running statistics count, and the weights that it can be folded into.

    Args:
        model: any torch model, which is not changed; or an ONNX file, which needs onnxruntime.
            Its weights are not copied, and a few values are held at a time.
        batches: each a tuple of positional arguments, a mapping of arguments by name, or the only
            one; tensors on the model's device, for a file arrays or tensors. For a model also a
            function that runs it.

    Raises:
        InputError: no norms, none that the batches reach, or no batch; for a file also no
            onnxruntime, missing external data, or inputs that the graph does not take.

    Examples:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        >>> found = probe_inference(net, [torch.randn(4, 8)])
        >>> found.layers[0].lost("float16"), found.lost_share("scaled")
        ({}, 0.0)
    """
    if isinstance(model, str | Path):
        model = OnnxFile(Path(model))
    source = _File(model) if isinstance(model, OnnxFile) else _Module(model)
    name = model.file if isinstance(model, OnnxFile) else type(model).__name__
    count = 0
    for count, batch in enumerate(batches if source.norms else (), 1):  # noqa: B007
        source.run(batch)
    source.hold_folded()
    return gather_ranges(
        source.norms, source.left_out, f"norm to measure in {name}", count, (*FORMS, "folded")
    )


def _try(norm: MeasuredNorm, x: Tensor, count: int, *running: Tensor, **own: Any) -> None:
    """Measure what a norm gets, and run it on that.

    Args:
        norm: takes the note.
        x: (N, *), of a layer or RMS norm with what is normalised last.
        count: how many values that is, or how many groups there are.
        running: mean and variance of a norm in evaluation, (C,).
        own: how it computes, if otherwise than torch's; see `RowNorm`.
    """
    x, stored = x.detach().float(), tuple(q.detach().float()[:, None] for q in running)
    if norm.kind == "batch" or running:
        rows = x.transpose(0, 1).flatten(1)
    elif norm.kind in ("layer", "rms"):
        rows = x.reshape(-1, count)
    else:
        rows = x.reshape(len(x) * count, -1)
    if not rows.numel() or (rows.shape[1] < 2 and not running):
        return
    centred = norm.kind != "rms"
    means = rows.mean(1, keepdim=True) if centred else torch.zeros_like(rows[:, :1])
    norm.measure(rows, *(stored or [means]))
    finite = rows.isfinite().all(1)  # what is not in float32 says nothing of half
    rows, stored = rows[finite], tuple(q[finite] for q in stored)
    if len(rows):
        with torch.autocast(rows.device.type, enabled=False):
            norm.count(run_forms(rows, norm.kind, RowNorm(norm.eps, centred, stored, **own)))
    if running:
        _hold(norm, "running_var", running[1])


def _hold(norm: MeasuredNorm, what: str, values: Tensor) -> None:
    """Note which shares of values float16 turns into inf, 0 and subnormal numbers."""
    half, values = values.half().abs(), values.abs()
    lost = {
        "inf": half.isinf() & values.isfinite(),
        "0": (half == 0) & (values > 0),
        "subnormal": (half > 0) & (half < DTYPES["float16"][0]),
    }
    norm.held[what] = {name: float(found.float().mean()) for name, found in lost.items()}


def _hold_folded(norm: MeasuredNorm, layer: str, weight: Tensor) -> None:
    """Note what float16 makes of a weight (C, n) that a batch norm is folded into."""
    _hold(norm, f"weight of {layer}", weight)
    norm.count({"folded": judge(weight.half(), weight, floor=0.0)})


class _Module:
    """The norms of a module, looked into by hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.left_out = model, dict[str, str]()
        self._layers: dict[nn.Module, tuple[MeasuredNorm, NormForm | None]] = {}
        for found in find_norm_layers(model):
            kind, form = _describe(found)
            if kind not in KINDS:
                self.left_out[found.name] = f"{found.type_name}: {kind}"
            elif found.module not in self._layers:
                eps = form.eps_of(found.module) if form else getattr(found.module, "eps", None)
                eps = _FLOAT32_EPS if eps is None else float(eps)
                norm = MeasuredNorm(found.name, found.type_name, kind, eps)
                self._layers[found.module] = norm, form
        self.norms = [norm for norm, _ in self._layers.values()]

    @torch.no_grad()
    def run(self, batch: Any) -> None:
        """Run a batch, and try each norm on what it gets."""
        args = batch if isinstance(batch, tuple | list) else (batch,)
        args, kwargs = ((), batch) if isinstance(batch, Mapping) else (args, {})
        with as_it_was(self.model), unfused(self.model), ExitStack() as hooks:
            self.model.eval()
            for layer in self._layers:
                hooks.callback(layer.register_forward_pre_hook(self._see, with_kwargs=True).remove)
            try:
                batch(self.model) if callable(batch) else self.model(*args, **kwargs)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                line = " ".join(str(error).split())[:300]
                raise InputError(f"the model does not take these inputs: {line}") from error

    def _see(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        norm, form = self._layers[module]
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        running = [q for q in (getattr(module, name, None) for name in RUNNING) if q is not None]
        count = getattr(module, "num_groups", 1)
        if norm.kind in ("layer", "rms"):
            x = torch.cat([part.flatten(0, -2) for part in x.unbind()]) if x.is_nested else x
            x = x.movedim(1, -1) if form and form.channels_first else x
            sizes = module.normalized_shape if form is None else form.sizes_of(module)
            count = math.prod(x.shape[-1:] if form and (form.apart or not sizes) else sizes)
        elif norm.kind == "instance":
            x = x.unsqueeze(0) if x.dim() == module._get_no_batch_dim() else x
            count = x.shape[1]
        own: dict[str, Any] = {"scaled": isinstance(module, Scaled)}
        if isinstance(module, LpLayerNorm | LpRMSNorm | Scaled):
            own["p"] = module.p
        _try(norm, x, count, *running, **own)

    def hold_folded(self) -> None:
        """Note what float16 makes of the weights that batch norms can be folded into."""
        norms = {norm.name: norm for norm in self.norms if norm.kind == "batch"}
        with as_it_was(self.model), unfused(self.model):
            self.model.eval()
            for name, layer, weight in folded_weights(self.model) if norms else ():
                _hold_folded(norms[name], layer, weight)


def _describe(found: NormLayer) -> tuple[str, NormForm | None]:
    """Return the kind of a norm, or why it is left out, and how another library's differs."""
    module = found.module
    if isinstance(module, MeanOnlyBatchNorm):
        return "it has no scale", None
    if isinstance(module, _LazyNormBase):
        return found.unsupported_reason, None
    kinds = [kind for cls, kind in _CLASSES.items() if isinstance(module, cls)]
    if kinds or found.kind is not None:
        return kinds[0] if kinds else str(found.kind), found.form
    form = find_form(module, ("layer", "rms"), named=False)
    return (form, None) if isinstance(form, str) else (form.kind, form)


class _File:
    """The norms of an ONNX file, whose inputs are fetched from runs."""

    def __init__(self, file: OnnxFile) -> None:
        self.file, self.left_out = file, dict[str, str]()
        self._found: dict[str, tuple[MeasuredNorm, OnnxNorm]] = {}
        self._makers = {name: node for node in file.model.graph.node for name in node.output}
        for found in find_onnx_norms(file.model, file.file.parent):
            node, several = found.nodes[0], len(found.nodes) > 1
            title = "of several nodes" if several else node.op_type
            name = found.weight.removesuffix(".weight")
            if name in ("", found.weight, *self._found):
                name = found.name.strip("/").removesuffix(f"/{title}")
            if found.output not in self._makers:
                self.left_out[name] = f"{title}: it is in a subgraph (If, Loop or Scan)"
            elif found.kind in LEFT:
                self.left_out[name] = LEFT[found.kind]
            elif found.kind == "batch" and not {*map(self._stored, node.input[1:])} <= {
                *file.weights
            }:
                self.left_out[name] = f"{title}: its running statistics are no constants"
            else:
                norm = MeasuredNorm(name, title, found.kind, found.eps)
                self._found[name] = norm, found
        self.norms = [norm for norm, _ in self._found.values()]
        file.expose([x for _, found in self._found.values() for x in (found.input, *found.added)])

    def run(self, batch: Any) -> None:
        """Run a batch, and try each norm on what it gets."""
        only = not isinstance(batch, Mapping | tuple | list)
        feeds, pairs = self.file.bind_inputs((batch,) if only else batch), [*self._found.values()]
        for part in (pairs[at : at + _AT_ONCE] for at in range(0, len(pairs), _AT_ONCE)):
            names = [x for _, found in part for x in (found.input, *found.added)]
            values = self.file.run(feeds, names)
            for norm, found in part:
                x = sum(torch.from_numpy(values[name]) for name in (found.input, *found.added))
                self._see(norm, found, x)

    def _see(self, norm: MeasuredNorm, found: OnnxNorm, x: Any) -> None:
        node, count, running = found.nodes[0], x.shape[1:2].numel(), list[Tensor]()
        if norm.kind in ("layer", "rms"):
            axes = found.axes or tuple(range(attribute_of(node, "axis", -1), x.dim()))
            if any(step.op_type == "GlobalAveragePool" for step in found.nodes):
                axes = tuple(range(2, x.dim()))
            count = math.prod(x.shape[axis] for axis in axes)
            x = x.movedim(axes, tuple(range(-len(axes), 0)))
        elif norm.kind == "group" and node.op_type != "InstanceNormalization":
            x = x.movedim(-1, 1) if attribute_of(node, "channels_last", 0) else x
            count = attribute_of(node, "num_groups") or attribute_of(node, "groups")
        elif norm.kind == "batch":
            running = [self._read(name) for name in node.input[3:5]]
        _try(norm, x, count, *running)

    def hold_folded(self) -> None:
        """Note what float16 makes of the weights that batch norms can be folded into."""
        uses = Counter(name for node in self.file.model.graph.node for name in node.input)
        for norm, found in self._found.values():
            layer = self._makers.get(found.input)
            if norm.kind != "batch" or layer is None or uses[found.input] > 1:
                continue
            by_output = layer.op_type == "Conv" or attribute_of(layer, "transB", 0)
            if by_output and self._stored(layer.input[1]) in self.file.weights:
                weight, gain, variance = map(
                    self._read, (layer.input[1], *found.nodes[0].input[1:5:3])
                )
                scale = gain.double() * (variance.double() + norm.eps).rsqrt()
                folded = weight.double().flatten(1) * scale[:, None]
                _hold_folded(norm, layer.name or layer.output[0], folded)

    def _stored(self, name: str) -> str:
        """Return what a value is in the file: torch's older exporter has equal ones once."""
        while (maker := self._makers.get(name)) is not None and maker.op_type == "Identity":
            name = maker.input[0]
        return name

    def _read(self, name: str) -> Tensor:
        return torch.tensor(self.file.read(self._stored(name)))
