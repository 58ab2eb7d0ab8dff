"""fold_norms: let a convolution do in evaluation what the batch norm behind it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nmlightning.errors import InputError, check_flag
from nmlightning.export.pairs import Left, Pair, find_pairs
from nmlightning.fusing.fusing import unfuse
from nmlightning.swappable import is_norm_with_activation
from nmlightning.weights.weight_place import WeightPlace

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Folded:
    """A batch norm, and the layer that now does what it did."""

    norm: str
    into: str


@dataclass(frozen=True)
class FoldReport:
    """What `fold_norms` did: the batch norms that it folded, and those left, with the reason.

    It prints as a table under rich, and as one line otherwise.
    """

    folded: tuple[Folded, ...]
    left: tuple[Left, ...]

    def __len__(self) -> int:
        return len(self.folded)

    def __str__(self) -> str:
        count = len(self.folded)
        left = f"; {len(self.left)} left as they are" if self.left else ""
        return f"folded {count} batch norm{'s' * (count != 1)}{left}"

    def __rich__(self) -> Table:
        from rich.markup import escape
        from rich.table import Table

        table = Table("batch norm", "folded into", title=escape(str(self)))
        for fold in self.folded:
            table.add_row(escape(fold.norm), escape(fold.into))
        for left in self.left:
            table.add_row(escape(left.norm), f"[dim]left: {escape(left.reason)}[/dim]")
        return table


def fold_norms(model: nn.Module, *, keep_norms: bool = False) -> FoldReport:
    """Fold every batch norm into the convolution or linear layer before it, in place.

        γ (W ∗ x + b − μ) / √(σ² + eps) + β  =  (s W) ∗ x + s (b − μ) + β,    s = γ / √(σ² + eps)

    μ and σ² are the running statistics of the norm, whatever statistic it trained by. W becomes s W
    (the s of its output channel), the bias s (b − μ) + β, which a layer without one gains, and the
    norm becomes `nn.Identity`. The arithmetic is float64, and the result has the dtype of W. The
    pairs are found by torch.fx: the layer's output must go to the norm and nowhere else, and
    neither may be called twice, share its weight, or have hooks. A norm behind a linear layer is
    taken to get (N, C), and optional arguments of `forward` to stay at their defaults. Norms that
    `swap_norms` fused with a ReLU are taken apart first.

    Args:
        model: in evaluation; afterwards it computes there what it did, and training differs.
        keep_norms: fold the scale alone and leave the norm to shift: W and b become s W and s b, μ
            becomes s μ, γ 1 and σ² 1 − eps. So the state dict keeps its keys and shapes.

    Returns:
        What was folded, and which batch norms were left, with the reason.

    Raises:
        InputError: a module of the model is in training mode.

    Example:
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
    pairs, left = find_pairs(model)
    for pair in pairs:
        if keep_norms:
            _fold_scale(pair)
        else:
            _fold_whole(pair)
            _replace(model, pair.norm)
    return FoldReport(tuple(Folded(p.norm_name, p.layer_name) for p in pairs), tuple(left))


@torch.no_grad()
def _fold_whole(pair: Pair) -> None:
    norm, layer, scale = pair.norm, pair.layer, _scale(pair.norm)
    shift = -_wide(norm.running_mean) * scale
    if norm.bias is not None:
        shift += _wide(norm.bias)
    if layer.bias is not None:
        shift += _wide(layer.bias) * scale
    _scale_weight(pair, scale)
    if layer.bias is None:
        layer.register_parameter("bias", nn.Parameter(shift.to(_weight(layer).dtype)))
    else:
        _tensor(layer.bias).copy_(shift)


@torch.no_grad()
def _fold_scale(pair: Pair) -> None:
    norm, layer, scale = pair.norm, pair.layer, _scale(pair.norm)
    _scale_weight(pair, scale)
    if layer.bias is not None:
        _tensor(layer.bias).copy_(_wide(layer.bias) * scale)
    _tensor(norm.running_mean).copy_(_wide(norm.running_mean) * scale)
    _tensor(norm.running_var).fill_(1 - norm.eps)
    if norm.weight is not None:
        norm.weight.fill_(1)


def _scale(norm: _BatchNorm) -> Tensor:
    """Return s, (C,), in float64."""
    scale = (_wide(norm.running_var) + norm.eps).rsqrt()
    return scale if norm.weight is None else scale * _wide(norm.weight)


def _scale_weight(pair: Pair, scale: Tensor) -> None:
    weight, layout = _weight(pair.layer), WeightPlace(pair.layer, "", "weight").layout
    weight.copy_(_wide(weight) * layout.spread(scale, weight))


def _weight(layer: nn.Module) -> Tensor:
    return _tensor(layer.weight)


def _wide(tensor: object) -> Tensor:
    return _tensor(tensor).double()


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor), "a pair has one"
    return value


def _replace(model: nn.Module, norm: nn.Module) -> None:
    """Put what is left of the norm in its place, under every name that it has."""
    rest: nn.Module = nn.Identity()
    if is_norm_with_activation(type(norm)):
        rest = nn.Sequential(norm.drop, norm.act).eval()  # type: ignore[arg-type]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is norm:
                parent._modules[name] = rest
