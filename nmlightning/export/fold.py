"""Folds each batch norm into the convolution or linear layer before it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Tracer
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from nmlightning.errors import InputError, check_flag
from nmlightning.int8.norms import quantizer_of
from nmlightning.name_patterns import by_reason
from nmlightning.reports.formatting import Grid, Report
from nmlightning.surgery.fuse.fuse import unfuse
from nmlightning.surgery.fuse.trace import TracedGraph, first_line
from nmlightning.surgery.norm_act import has_activation
from nmlightning.surgery.norm_layers import NormLayer, find_norm_layers
from nmlightning.weights.layer_weights import WeightLocation


@dataclass(frozen=True)
class Folded:
    """A batch norm, and the layer that now does what it did."""

    norm: str
    into: str


@dataclass(frozen=True)
class Left:
    """A batch norm that cannot be folded, and why."""

    norm: str
    reason: str


@dataclass(frozen=True, repr=False)
class FoldReport(Report):
    """The batch norms that `fold_norms` folded, and those left, with the reason.

    It prints as a table under rich; otherwise as a line, and one for each reason.
    """

    folded: tuple[Folded, ...]
    left: tuple[Left, ...]

    def __len__(self) -> int:
        return len(self.folded)

    def counts(self) -> str:
        """Return how many norms were folded and left."""
        count = len(self.folded)
        left = f"; {len(self.left)} not folded" if self.left else ""
        return f"folded {count} batch norm{'s' * (count != 1)}{left}"

    def describe(self) -> str:
        """Return the counts, and a line for each reason why norms were left."""
        reasons = by_reason({left.norm: left.reason for left in self.left})
        return "\n".join([self.counts(), *(f"not folded {line}" for line in reasons)])

    def __rich__(self) -> Grid:
        rows = [(fold.norm, fold.into) for fold in self.folded]
        rows += [(left.norm, f"not folded: {left.reason}") for left in self.left]
        return Grid(("batch norm", "folded into"), rows, self.counts())


def fold_norms(model: nn.Module, *, keep_norms: bool = False) -> FoldReport:
    """Fold every batch norm into the convolution or linear layer before it, in place.

        γ (W ∗ x + b − μ) / √(σ² + eps) + β  =  (s W) ∗ x + s (b − μ) + β,    s = γ / √(σ² + eps)

    μ and σ² are the running statistics of the norm, whatever statistic it trained by. W becomes s W
    (the s of its output channel), the bias s (b − μ) + β, which a layer without one gains, and the
    norm becomes `nn.Identity`. The arithmetic is float64, and the result has the dtype of W. The
    pairs are found by torch.fx: the layer's output must go to the norm and nowhere else, and
    neither may be called twice, share its weight, or have hooks. A norm after a linear layer is
    assumed to get (N, C), and optional arguments of `forward` to stay at their defaults. Norms that
    `swap_norms` fused with a ReLU are unfused first.

    Args:
        model: in evaluation, where it computes the same afterwards; training differs.
        keep_norms: fold the scale alone and let the norm shift: W and b become s W and s b, μ
            becomes s μ, γ 1 and σ² 1 − eps. So the state dict keeps its keys and shapes.

    Returns:
        A report of the folded batch norms, and of the others with the reason.

    Raises:
        InputError: a module of the model is in training mode.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
        >>> print(fold_norms(net))
        folded 1 batch norm

    Source: Jacob et al. 2018, §3.2 (https://arxiv.org/abs/1712.05877).
    """
    check_flag("keep_norms", keep_norms)
    if any(module.training for module in model.modules()):
        raise InputError(
            f"fold_norms keeps what {type(model).__name__} computes in evaluation, and it is in "
            "training: call eval() first."
        )
    unfuse(model)
    pairs, left = _find_pairs(model)
    for pair in pairs:
        _fold(pair, keep_norms)
        if not keep_norms:
            _replace(model, pair.norm)
    return FoldReport(tuple(Folded(p.norm_name, p.layer_name) for p in pairs), tuple(left))


@torch.no_grad()
def folded_weights(model: nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield of each norm that `fold_norms` would fold its name, the layer's, and s W as (C, n).

    Of a model in evaluation, which is not changed; in float64.
    """
    for pair in _find_pairs(model)[0]:
        layout = WeightLocation(pair.layer, "", "weight").layout
        weight: Any = pair.layer.weight
        folded = weight.double() * layout.spread(_scale_of(pair.norm), weight)
        yield pair.norm_name, pair.layer_name, layout.rows(folded).flatten(1)


def _scale_of(norm: Any) -> torch.Tensor:
    """Return s, (C,), in float64."""
    scale: torch.Tensor = (norm.running_var.double() + norm.eps).rsqrt()
    return scale if norm.weight is None else scale * norm.weight.double()


@torch.no_grad()
def _fold(pair: _Pair, keep_norm: bool) -> None:
    norm: Any = pair.norm
    layer: Any = pair.layer
    scale = _scale_of(norm)
    shift = -norm.running_mean.double() * scale
    bias = None if layer.bias is None else layer.bias.double() * scale
    layout = WeightLocation(layer, "", "weight").layout
    layer.weight.copy_(layer.weight.double() * layout.spread(scale, layer.weight))
    if keep_norm:
        norm.running_mean.copy_(-shift)
        norm.running_var.fill_(1 - norm.eps)
        if norm.weight is not None:
            norm.weight.fill_(1)
    else:
        if norm.bias is not None:
            shift += norm.bias.double()
        bias = shift if bias is None else shift + bias
    if layer.bias is not None:
        layer.bias.copy_(bias)
    elif bias is not None:
        layer.register_parameter("bias", nn.Parameter(bias.to(layer.weight.dtype)))


def _replace(model: nn.Module, norm: nn.Module) -> None:
    """Replace the norm by what is left of it, under every name that it has."""
    rest: nn.Module = nn.Identity()
    if has_activation(type(norm)):
        rest = nn.Sequential(norm.drop, norm.act).eval()  # type: ignore[arg-type]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is norm:
                parent._modules[name] = rest


# Exactly these: a subclass may do something to its weight or its output.
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FOLDABLE = (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)


@dataclass(frozen=True, eq=False)
class _Pair:
    """A batch norm, and the convolution or linear layer whose output goes to it alone."""

    norm_name: str
    norm: _BatchNorm
    layer_name: str
    layer: nn.Module


def _find_pairs(model: nn.Module) -> tuple[list[_Pair], list[Left]]:
    """Return the batch norms that can be folded into what precedes them, and those that cannot."""
    norms = find_norm_layers(model)
    found = {
        x.module: x
        for x in reversed(norms)
        if isinstance(x.module, _BatchNorm) or "BatchNorm" in x.type_name
    }
    layers = list(reversed(found.values()))  # once each, under the first name
    try:
        traced = _trace(model, [x.module for x in norms])
    except Exception as error:  # whatever a forward pass raises that is given no tensors
        reason = f"the network cannot be traced by torch.fx: {first_line(error)}"
        return [], [Left(x.name, reason) for x in layers]
    results = [_pair(layer, traced) for layer in layers]
    pairs = [result for result in results if isinstance(result, _Pair)]
    return pairs, [result for result in results if isinstance(result, Left)]


def _pair(found: NormLayer, traced: TracedGraph) -> _Pair | Left:
    norm = found.module
    reason = _unsupported_norm(found, traced)
    if reason:
        return Left(found.name, reason)
    call = traced.input_of(traced.calls(norm)[0])
    layer = traced.module_of(call)
    if layer is None or call is None or type(layer) not in _FOLDABLE:
        is_parametrized = layer is not None and parametrize.is_parametrized(layer)
        parametrized = " with a parametrized weight" if is_parametrized else ""
        return Left(found.name, f"it follows {traced.word_for(call)}{parametrized}")
    name, times = str(call.target), len(traced.calls(layer))
    assert isinstance(norm, _BatchNorm), "others are unsupported"
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if _has_hooks(layer) or "forward" in vars(layer):
        reason = f"{name} has hooks, or a forward of its own"
    elif times > 1:
        reason = f"the network calls {name} {times} times"
    elif traced.shares_tensors(layer):
        reason = f"the weight of {name} is used elsewhere, too"
    elif channels != norm.num_features:
        reason = f"its {norm.num_features} channels are not the {channels} outputs of {name}"
    elif len(call.users) > 1:
        reason = f"the output of {name} is used elsewhere, too"
    return Left(found.name, reason) if reason else _Pair(found.name, norm, name, layer)


def _unsupported_norm(found: NormLayer, traced: TracedGraph) -> str:
    norm = found.module
    if found.kind != "batch":
        return f"{found.type_name} is neither a batch norm of torch nor of this package"
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics"
    if quantizer_of(norm) is not None:
        return "its input is quantised"
    if _has_hooks(norm):
        return "it has hooks"
    times = len(traced.calls(norm))
    if times != 1:
        return f"the network calls it {times} times" if times else "the traced network has no call"
    return "its state is used elsewhere, too" if traced.shares_tensors(norm) else ""


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


class _Tracer(Tracer):
    def __init__(self, whole: Collection[nn.Module]) -> None:
        super().__init__()
        self._whole = set(whole)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        kept = isinstance(module, (_ConvNd, nn.Linear)) or module in self._whole
        return kept or super().is_leaf_module(module, name)


def _trace(model: nn.Module, whole: Collection[nn.Module]) -> TracedGraph:
    """Trace a network in evaluation; `whole` modules are one call each, as torch's own are."""
    # What has a default stays at it: else a None would be traced as a tensor.
    arguments = inspect.signature(model.forward).parameters.values()
    defaults = {a.name: a.default for a in arguments if a.default is not a.empty}
    with warnings.catch_warnings():
        # Torch cannot write an assertion for every default; no traced graph is run here.
        warnings.filterwarnings("ignore", "Was not able to add assertion")
        return TracedGraph(_Tracer(whole).trace(model, concrete_args=defaults), model)
