"""Layer and RMS norms of a trained network as norms that float16 inference does not break."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nmlightning.errors import InputError
from nmlightning.norms.batch_norm_base import describe_norm
from nmlightning.norms.layer_norm import LpLayerNorm, LpRMSNorm
from nmlightning.surgery.norm_layers import NormLayer, find_norm_layers
from nmlightning.surgery.swap import swap_norms

Evaluation = Callable[[nn.Module], Mapping[str, float]]
Comparison = Callable[[nn.Module, nn.Module], float]  # of the new network with the trained one
_KINDS = ("layer", "rms")


@dataclass(frozen=True)
class HalfSafe:
    """What was swapped for float16, and what that changed.

    Attributes:
        norm: `scaled`, or `l1`.
        swapped: the names of the layer and RMS norms.
        left: the reason for each other norm that squares its input, by name.
        change: the largest of outputs, over the largest of these.
        metrics: what an evaluation measured before and after, by name.
    """

    norm: str
    swapped: tuple[str, ...]
    left: Mapping[str, str]
    change: float
    metrics: Mapping[str, tuple[float, float]]


def make_half_safe(
    net: nn.Module, norm: str, evaluate: Evaluation, compare: Comparison
) -> HalfSafe:
    """Swap the layer and RMS norms of a network in evaluation, in place.

    `scaled` computes the same, also of our L1 norms. For `l1`, which is scaled, too, each weight
    is multiplied by the factor f of each feature that fits the new output to the old one,
    Σ old · new / Σ new² without biases, on what `evaluate` runs through the network; it is called
    again afterwards.

    Raises:
        InputError: there is no such norm, or only ones that `swap_norms` leaves.
    """
    layers = find_norm_layers(net)
    powers = {x.name: _power(x.module) for x in layers if x.kind in _KINDS}
    chosen = [name for name, power in powers.items() if power]
    left = {x.name: x.unsupported_reason for x in layers if x.unsupported_reason}
    if not chosen:
        raise InputError(
            f"half_safe: {type(net).__name__} has no layer or RMS norm of torch's or the L1 "
            "formula to swap."
        )
    trained = copy.deepcopy(net)
    # Unscaled, the sum of |x| would leave float16 where a runtime adds in half.
    for power in (1.0, 2.0):
        if names := [name for name in chosen if powers[name] == power]:
            options = {"p": 1.0 if norm == "l1" else power}
            swap_norms(net, "scaled", options, kinds=_KINDS, include=names)
    metrics: dict[str, tuple[float, float]] = {}
    if norm == "l1":
        fits = {id(x.module): _Fit(x, trained) for x in find_norm_layers(net) if x.name in chosen}
        before = evaluate(trained)
        for fit in fits.values():
            fit.scale_weight()
        metrics = {name: (before[name], value) for name, value in evaluate(net).items()}
    return HalfSafe(norm, tuple(chosen), left, compare(net, trained), metrics)


def _power(module: nn.Module) -> float | None:
    """Return the p of the scaled norm that computes what torch's norm or ours does, if any."""
    if describe_norm(module) is None:
        return 2.0
    is_power = isinstance(module, LpLayerNorm | LpRMSNorm) and module.p in (1, 2)
    return float(module.p) if is_power and module.constant in ("exact", "paper") else None  # type: ignore[arg-type]


class _Fit:
    """The factors of a new norm's weight by what the old one gives in the trained network."""

    def __init__(self, layer: NormLayer, trained: nn.Module) -> None:
        module: Any = layer.module
        form, own = layer.form, (module.weight, getattr(module, "bias", None))
        self._module, (self._weight, self._bias) = module, form.affine_of(module) if form else own
        self._offset = form.offset if form else 0.0
        self._moves = form is not None and form.channels_first and self._weight.dim() == 1
        self._sums: Any = None
        if self._weight is not None and not (form and form.activates):
            trained.get_submodule(layer.name).register_forward_hook(self._see, with_kwargs=True)

    @torch.no_grad()
    def _see(self, _: nn.Module, args: Any, kwargs: Any, old: Tensor) -> None:
        both = [old, self._module(*args, **kwargs)]
        y, z = (x.movedim(1, -1).double() if self._moves else x.double() for x in both)
        if self._bias is not None:
            y, z = y - self._bias, z - self._bias
        sums = torch.stack([(x * z).sum_to_size(self._weight.shape) for x in (y, z)])
        self._sums = sums if self._sums is None else self._sums + sums

    @torch.no_grad()
    def scale_weight(self) -> None:
        if self._sums is not None:
            factor = torch.where(self._sums[1] > 0, self._sums[0] / self._sums[1], 1.0)
            self._weight.copy_((self._weight + self._offset) * factor - self._offset)
