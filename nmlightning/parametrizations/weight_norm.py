"""WeightNorm: computes the weight w of a layer from its unnormalised weight v."""

import copy
import math
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from nmlightning.errors import InputError, check_choice, check_flag, is_number
from nmlightning.parametrizations.cache import HiddenWeight, WeightPass, compute_weights
from nmlightning.parametrizations.normalize import (
    as_column,
    is_captured,
    is_recorded,
    normalise_channels,
    normalise_together,
)
from nmlightning.weights.channel_norms import (
    ROWS,
    ChannelLayout,
    channel_norms,
    gather_channels,
    is_flat,
    is_sharded,
    local_part,
)

Kind = Literal["weight", "bounded"]
Gain = Literal["none", "layer", "channel"]

NAMES = {1.0: "L1", 2.0: "L2", math.inf: "L∞"}
_GAINS: dict[Kind, tuple[Gain, ...]] = {
    "bounded": ("none", "channel"),
    "weight": ("channel", "layer"),
}


@dataclass(frozen=True)
class Settings:
    """What `apply_weight_norm` takes; `rho` is None for "init".

    Raises:
        InputError: from `of`, for what is not allowed.
    """

    kind: Kind
    p: float
    rho: float | None
    gain: Gain
    project: bool

    @classmethod
    def of(
        cls,
        kind: Kind = "bounded",
        p: float | str = 2,
        rho: float | str = "init",
        gain: Gain | None = None,
        project: bool = False,
    ) -> "Settings":
        """Return them checked, with the gain that the kind has by default."""
        check_choice("kind", kind, _GAINS)
        if gain is None:
            gain = "none" if kind == "bounded" else "channel"
        check_choice(f"gain of {kind!r}", gain, _GAINS[kind])
        return cls(kind, _check_p(p), _check_rho(rho), gain, check_flag("project", project))


def _check_p(p: float | str) -> float:
    try:
        number = float(p)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(p, bool) or number not in NAMES:
        raise InputError(f"p is 1, 2 or inf, got {p!r}.")
    return number


def _check_rho(rho: float | str) -> float | None:
    if rho == "init":
        return None
    if not is_number(rho) or not 0 < float(rho) < math.inf:
        raise InputError(f"rho is 'init' or a positive number, got {rho!r}.")
    return float(rho)


class Holder(ParametrizationList):
    """What has v. Of one parametrization it returns w with less ado; a copy says that it is one."""

    def forward(self) -> Tensor:
        """Return w."""
        if len(self._modules) > 1:
            return super().forward()
        return self._modules["0"](self._parameters["original"])  # type: ignore[no-any-return]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for norm in self.children():
            if isinstance(norm, WeightNorm):
                norm.hidden.add_holder(self)


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
        cache: compute w once for all that happens between two steps of an optimizer, and in
            evaluation, without gradients, once for as long as nothing changes.
        weight_pass: computes those weights together that are cached; one of its own by default.

    Attributes:
        rho: ρ, in float32 at least, as `initial_gain_norm` is, whatever the module is cast to.
        order: p, so that a state dict with another is refused.
        gain: g, (C,) or (1,), in the dtype of v, and trained where v is.
        initial_gain_norm: ‖g⁰‖₂, of a bounded layer with gains.
    """

    rho: Tensor
    order: Tensor
    gain: nn.Parameter | None
    initial_gain_norm: Tensor | None

    def __init__(
        self,
        v: Tensor,
        settings: Settings,
        layout: ChannelLayout = ROWS,
        *,
        cache: bool = False,
        weight_pass: WeightPass | None = None,
    ) -> None:
        super().__init__()
        self.settings, self.cache, self.form = settings, cache, (settings.p, layout)
        norms = channel_norms(v, *self.form)
        if settings.rho is not None:
            norms = torch.full_like(norms, settings.rho)
        self.register_buffer("rho", _power_mean(norms, settings.p))
        self.register_buffer("order", torch.full_like(self.rho, settings.p))
        self.register_parameter("gain", self._first_gain(norms, v))
        bounded = self.gain is not None and settings.kind == "bounded"
        whole = torch.linalg.vector_norm(norms) if bounded else None
        self.register_buffer("initial_gain_norm", whole)
        self.positions: list[int] = []
        self._join(WeightPass() if weight_pass is None else weight_pass)

    def _first_gain(self, norms: Tensor, v: Tensor) -> nn.Parameter | None:
        if self.settings.gain == "none":
            return None
        gains = norms if self.settings.gain == "channel" else self.rho.reshape(1)
        return nn.Parameter(gains.to(v.dtype, copy=True), requires_grad=v.requires_grad)

    def _join(self, weight_pass: WeightPass) -> None:
        """Begin, with nothing known yet."""
        self.hidden, self._pass = HiddenWeight(), weight_pass
        self._fixed_scales: tuple[Any, ...] | None = None
        weight_pass.add(self)

    def forward(self, v: Tensor) -> Tensor:
        """Return w."""
        if is_recorded() or v.is_inference():
            return self._by_formula(v)
        if not self._may_keep() or is_captured(v):
            return compute_weights([self], [v])[0]
        kept = self.hidden.weight(*self.sources(v))
        if kept is not None:
            return kept
        return self._pass.compute(self, v) if torch.is_grad_enabled() else self._evaluate(v)

    def _evaluate(self, v: Tensor) -> Tensor:
        """Return w and keep it: a text is written in many steps, each of which reads it."""
        with torch.inference_mode(mode=False), torch.no_grad():
            w = compute_weights([self], [v])[0]
            self.hidden.keep(w, *self.sources(v))
        return w

    def _by_formula(self, v: Tensor) -> Tensor:
        scales = self.rho if self.gain is None else self.gain
        if self.initial_gain_norm is not None:
            scales = normalise_channels(scales, self.initial_gain_norm, 2)
        return normalise_channels(v, scales, *self.form)

    def sources(self, v: Tensor) -> tuple[Tensor, ...]:
        """Return v and what else w is computed from."""
        gain, total = self.gain, self.initial_gain_norm
        if gain is None:
            return v, self.rho
        return (v, gain) if total is None else (v, gain, total)

    def fixed_scales(self, v: Tensor) -> Tensor:
        """Return ρ for each channel, as the ways to normalise take it; made once."""
        rho, made = self.rho, self._fixed_scales
        key = rho._version, rho.data_ptr(), v.shape
        if made is None or made[0] is not rho or made[1] != key:
            with torch.inference_mode(mode=False):
                self._fixed_scales = made = rho, key, as_column(rho, v, self.form[1])
        return made[2]  # type: ignore[no-any-return]

    def _may_keep(self) -> bool:
        """Return whether w may be kept: until an optimizer's next step, or while it evaluates."""
        if not torch.is_grad_enabled():
            return self.cache and not self.training
        return self.cache and self.training and self.hidden.is_stepped

    def waiting(self, device: torch.device) -> Tensor | None:
        """Return v, if w may be kept and is on the device."""
        v = self.hidden.value if self._may_keep() else None
        if v is None or v.device != device or is_sharded(v) or v.is_inference():
            return None
        return v

    @torch.no_grad()
    def channel_norms(self, v: Tensor) -> Tensor:
        """Return ‖w_i‖₂, (C,), of all ranks' channels; every rank has to ask."""
        p, layout = self.form
        norms, own = (gather_channels(channel_norms(v, order, layout)) for order in (2, p))
        gain = None if self.gain is None else gather_channels(self.gain)
        if gain is not None and self.initial_gain_norm is not None:
            gain = gain * self.initial_gain_norm / torch.linalg.vector_norm(gain)
        scales = self.rho if gain is None else gain.abs()
        return torch.where(norms > 0, scales * (norms / own), 0.0)

    @torch.no_grad()
    def right_inverse(self, w: Tensor) -> Tensor:
        """Return the v to keep when `w` is assigned to the weight; g takes its norms, ρ stays.

        While it is being registered g stays, too: `rho` may have set it.
        """
        if self.gain is not None and self.hidden.value is not None:
            norms = channel_norms(w, *self.form)
            by_channel = self.settings.gain == "channel"
            self.gain.copy_(norms if by_channel else _power_mean(norms, self.settings.p))
        return w

    def after_own_step(self, moved: Container[Tensor]) -> None:
        """Project v, if it is among what an optimizer has moved."""
        v = self.hidden.value
        assert v is not None
        self.hidden.is_stepped = True
        self.cache = self.cache and not is_sharded(v)  # As in `train`.
        if self.settings.project and v in moved:
            self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Bring ‖v_i‖_p to ρ, where it is not 0.

        What the optimizer keeps stays: its gradients were all taken at this norm.

        Raises:
            InputError: channels are split over ranks, as those of a transposed convolution are.
        """
        v = self.hidden.value
        assert v is not None
        if is_sharded(v):
            channel_norms(v, *self.form)  # raises where they are split
        local = local_part(v)
        local.copy_(normalise_together([local], [self.rho], [self.form])[0])

    def train(self, mode: bool = True) -> "WeightNorm":
        """Forget w, too: weights may have been exchanged, for averages of them say."""
        self.hidden.forget()
        v = self.hidden.value
        if v is not None and (is_sharded(v) or is_flat(v)):
            self.cache = False  # It would hold what FSDP lets go of.
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> "WeightNorm":
        """Leave ρ and ‖g⁰‖ exact where the module is cast to half."""
        self.hidden.forget()
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in exact.items():
            after = getattr(self, name)
            if torch.finfo(after.dtype).bits < 32:
                setattr(self, name, before.to(after.device))
        return self

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        saved, p = state_dict.get(prefix + "order"), self.settings.p
        if saved is not None and float(saved) != p:
            theirs, where = f"L{float(saved):g}".replace("inf", "∞"), prefix.rstrip(".")
            lists[-1].append(f"{where} was normalised by {theirs} there, here it is by {NAMES[p]}.")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)

    def __deepcopy__(self, memo: dict[int, Any]) -> "WeightNorm":
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        own = {"hidden": None, "_pass": None, "_fixed_scales": None}
        copied.__dict__.update(copy.deepcopy({**self.__dict__, **own}, memo))
        copied._join(memo.setdefault(id(self._pass), WeightPass()))
        return copied

    def extra_repr(self) -> str:
        """Return the settings."""
        by_channel = "" if self.gain is None else f", gain of {len(self.gain)}"
        settings = self.settings
        return (
            f"p={settings.p:g}, rho={float(self.rho):.4g}{by_channel}, project={settings.project}"
        )


def _power_mean(norms: Tensor, p: float) -> Tensor:
    """Return ‖V‖_p / N^(1/p), of the N channels that are not zero."""
    count = (norms > 0).sum().clamp(min=1)
    whole: Tensor = torch.linalg.vector_norm(norms, p) / count ** (1 / p)
    return whole
