"""WeightNorm: what turns the hidden weight v of a layer into the weight w that it computes with."""

import copy
import weakref
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from nmlightning.weights.channel_norms import (
    ROWS,
    ChannelLayout,
    channel_norms,
    gather_channels,
)
from nmlightning.weights.weight_norm.normalised_weight import (
    NormalisedWeight,
    normalise_channels,
    normalise_values,
)
from nmlightning.weights.weight_norm.settings import Settings
from nmlightning.weights.weight_norm.upkeep import keep_up


class WeightNorm(nn.Module):
    """The parametrization of one weight; `apply_weight_norm` makes and registers it.

        w_i = s_i v_i / ‖v_i‖_p

    | kind | gain | s_i | learned |
    |---|---|---|---|
    | bounded | none | ρ | v |
    | bounded | channel | g_i ‖g⁰‖₂ / ‖g‖₂ | v, g |
    | weight | channel | g_i | v, g |
    | weight | layer | g | v, g |

    Args:
        v: the weight as it is before; its norms give ρ and g where `rho` does not.
        settings: of the norm; a g_i begins as ‖v_i‖_p and one g for a layer as ρ, or as `rho`.
        layout: where the output channels are.
        cache: compute w once for all that happens between two optimizer steps in training.

    Attributes:
        rho: ρ.
        gain: g, (C,) or (1,), in the dtype of v, and trained where v is.
        positions: which of its module's parameters the weight was, in each place that it is in.
    """

    rho: Tensor
    gain: nn.Parameter | None
    initial_gain_norm: Tensor | None

    def __init__(
        self, v: Tensor, settings: Settings, layout: ChannelLayout = ROWS, *, cache: bool = False
    ) -> None:
        super().__init__()
        self.settings, self.layout, self.cache, self.p = settings, layout, cache, settings.p
        norms = channel_norms(v, self.p, layout)
        self._has_zeros = not bool(norms.all())
        if settings.rho is not None:
            norms = torch.full_like(norms, settings.rho)
        self.register_buffer("rho", _power_mean(norms, self.p))
        self.register_parameter("gain", self._first_gain(norms, v))
        bounded = self.gain is not None and settings.kind == "bounded"
        whole = torch.linalg.vector_norm(norms) if bounded else None
        self.register_buffer("initial_gain_norm", whole)
        self.positions: tuple[int, ...] = ()
        self._cached: tuple[tuple[Any, ...], Tensor] | None = None
        self._holder: weakref.ref[ParametrizationList] | None = None

    def _first_gain(self, norms: Tensor, v: Tensor) -> nn.Parameter | None:
        if self.settings.gain == "none":
            return None
        gains = norms if self.settings.gain == "channel" else self.rho.reshape(1)
        return nn.Parameter(gains.to(v.dtype, copy=True), requires_grad=v.requires_grad)

    def scales(self) -> Tensor:
        """Return s, (C,) or one element: the norms of w but for their sign."""
        if self.gain is None:
            return self.rho
        if self.initial_gain_norm is None:
            return self.gain
        # The gains of a bounded layer are one vector, whose norm stays.
        return _normalise(self.gain[None], self.initial_gain_norm, 2, ROWS)[0]

    def forward(self, v: Tensor) -> Tensor:
        """Return w."""
        if self._has_zeros:
            return normalise_channels(v, self.scales(), self.p, self.layout)
        if not (self.cache and self.training and torch.is_grad_enabled()) or _is_traced():
            return _normalise(v, self.scales(), self.p, self.layout)
        trained = None if self.gain is None else self.gain.requires_grad
        versions = v._version, None if self.gain is None else self.gain._version
        key = (v, v.data_ptr(), v.requires_grad, trained, *versions)
        if self._cached is None or not _same(self._cached[0], key):
            self._cached = key, _normalise(v, self.scales(), self.p, self.layout)
        return self._cached[1]

    @torch.no_grad()
    def channel_norms(self, v: Tensor) -> Tensor:
        """Return ‖w_i‖₂, (C,), of all ranks' channels; every rank has to ask."""
        norms, own = (gather_channels(channel_norms(v, p, self.layout)) for p in (2, self.p))
        gain = None if self.gain is None else gather_channels(self.gain)
        if gain is not None and self.initial_gain_norm is not None:
            gain = gain * self.initial_gain_norm / torch.linalg.vector_norm(gain)
        scales = self.rho if gain is None else gain.abs()
        return torch.where(norms > 0, scales * (norms / own), 0.0)

    @torch.no_grad()
    def right_inverse(self, w: Tensor) -> Tensor:
        """Return the v to keep when `w` is assigned to the weight; g takes its norms, ρ stays."""
        if self.gain is not None:
            norms = channel_norms(w, self.p, self.layout)
            by_channel = self.settings.gain == "channel"
            gains = norms if by_channel else _power_mean(norms, self.p)
            self.gain.copy_(gains)
        return w

    def keep(self, holder: ParametrizationList) -> None:
        """Do from now on what is due after each optimizer step, to the v that `holder` has."""
        self._holder = weakref.ref(holder)
        if self.settings.project:
            self._project(holder.original)
        if self.settings.project or self.cache:
            keep_up(self)

    def after_step(self, moved: Container[Tensor]) -> None:
        """Forget w, and project v if the step moved it."""
        self._cached = None
        v = self._hidden()
        if self.settings.project and v is not None and v in moved:
            self._project(v)

    @torch.no_grad()
    def _project(self, v: Tensor) -> None:
        """Bring ‖v_i‖_p to ρ, where it is neither 0 nor infinite.

        What the optimizer keeps stays: its gradients were all taken at this norm.
        """
        local = v.to_local() if type(v).__name__ == "DTensor" else v  # type: ignore[attr-defined]
        factors = self.rho / channel_norms(local, self.p, self.layout)
        local.mul_(self.layout.spread(factors.where(factors.isfinite(), 1.0), local))

    @property
    def is_sharded(self) -> bool:
        """Whether v is split over ranks."""
        return type(self._hidden()).__name__ == "DTensor"

    def _hidden(self) -> Tensor | None:
        holder = None if self._holder is None else self._holder()
        return None if holder is None else holder.original

    def train(self, mode: bool = True) -> "WeightNorm":
        """Forget w, too: weights may have been exchanged, for averages of them say."""
        self._cached = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> "WeightNorm":
        self._cached = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None, "_holder": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "WeightNorm":
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        holder = None if self._holder is None else memo.get(id(self._holder()))
        copied._holder = None if holder is None else weakref.ref(holder)
        if self.settings.project or self.cache:
            keep_up(copied)
        return copied

    def extra_repr(self) -> str:
        """Return the settings."""
        by_channel = "" if self.gain is None else f", gain of {len(self.gain)}"
        return (
            f"p={self.p:g}, rho={float(self.rho):.4g}{by_channel}, project={self.settings.project}"
        )


def _normalise(v: Tensor, scales: Tensor, p: float, layout: ChannelLayout) -> Tensor:
    if _is_traced():
        return normalise_channels(v, scales, p, layout)
    if not torch.is_grad_enabled():
        return normalise_values(v, scales, p, layout)
    return NormalisedWeight.apply(v, scales, p, layout)  # type: ignore[no-any-return]


def _is_traced() -> bool:
    """Return whether the operations are being recorded: compiled, exported or traced."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def _power_mean(norms: Tensor, p: float) -> Tensor:
    """Return ‖V‖_p / N^(1/p), of the N channels that are not zero."""
    count = (norms > 0).sum().clamp(min=1)
    whole: Tensor = torch.linalg.vector_norm(norms, p) / count ** (1 / p)
    return whole


def _same(key: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return key[0] is other[0] and key[1:] == other[1:]
