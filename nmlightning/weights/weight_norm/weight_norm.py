"""WeightNorm: what turns the hidden weight v of a layer into the weight w that it computes with."""

import copy
from collections.abc import Container, Iterable, Sequence
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
from nmlightning.weights.shards import is_sharded, local_part
from nmlightning.weights.weight_norm.hidden_weight import HiddenWeight
from nmlightning.weights.weight_norm.normalised_weights import normalise_together
from nmlightning.weights.weight_norm.settings import NAMES, Settings
from nmlightning.weights.weight_norm.upkeep import keep_up
from nmlightning.weights.weight_norm.ways import normalise_channels
from nmlightning.weights.weight_norm.weight_pass import WeightPass, compute_weights


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
        cache: in training compute w once for all that happens between two steps of an optimizer.
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
        self.positions: tuple[int, ...] = ()
        self._join(WeightPass() if weight_pass is None else weight_pass)

    def _first_gain(self, norms: Tensor, v: Tensor) -> nn.Parameter | None:
        if self.settings.gain == "none":
            return None
        gains = norms if self.settings.gain == "channel" else self.rho.reshape(1)
        return nn.Parameter(gains.to(v.dtype, copy=True), requires_grad=v.requires_grad)

    def _join(self, weight_pass: WeightPass, holders: Iterable[ParametrizationList] = ()) -> None:
        """Begin, with nothing known yet."""
        self.hidden, self._pass = HiddenWeight(holders), weight_pass
        weight_pass.members.add(self)
        keep_up(self)

    def keep(self, holders: Sequence[ParametrizationList], positions: Sequence[int]) -> None:
        """Do from now on what is due after each optimizer step, to the v that `holders` have.

        Args:
            holders: it was registered with, in each place that the weight is in.
            positions: which of its module's parameters the weight was, in each place.
        """
        self.hidden, self.positions = HiddenWeight(holders), tuple(positions)
        if self.settings.project:
            self._project(holders[0].original)

    def forward(self, v: Tensor) -> Tensor:
        """Return w."""
        if _is_recorded():
            return self._by_formula(v)
        hidden = self.hidden
        may_keep = self._may_keep() and torch.is_grad_enabled() and not _is_captured(v)
        if may_keep:
            kept = hidden.weight(v, self.gain)
            if kept is not None:
                return kept
        if v.is_inference() or hidden.is_zero_somewhere(v, self.form):
            return self._by_formula(v)
        return self._pass.compute(self, v) if may_keep else compute_weights([self], [v])[0]

    def _by_formula(self, v: Tensor) -> Tensor:
        scales = self.rho if self.gain is None else self.gain
        if self.initial_gain_norm is not None:
            scales = normalise_channels(scales, self.initial_gain_norm, 2)
        return normalise_channels(v, scales, *self.form)

    def _may_keep(self) -> bool:
        """Return whether w may be kept until the next optimizer step."""
        return self.cache and self.training and self.hidden.is_stepped

    def waiting(self, device: torch.device) -> Tensor | None:
        """Return v, if w may be kept and is on the device."""
        v = self.hidden.value if self._may_keep() else None
        if v is None or v.device != device or is_sharded(v) or v.is_inference():
            return None
        return None if self.hidden.is_zero_somewhere(v, self.form) else v

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
        if self.gain is not None and self.hidden.holders:
            norms = channel_norms(w, *self.form)
            by_channel = self.settings.gain == "channel"
            self.gain.copy_(norms if by_channel else _power_mean(norms, self.settings.p))
        return w

    def after_step(self, moved: Container[Tensor]) -> None:
        """Forget w, and project v if the step moved it."""
        hidden = self.hidden
        hidden.forget()
        v = hidden.value
        if v is None or not (v in moved or self.gain in moved):
            return
        hidden.note_change(v)
        if not hidden.is_stepped:
            hidden.is_stepped = True
            self.cache = self.cache and not is_sharded(v)  # It would hold what FSDP lets go of.
        if self.settings.project and v in moved:
            self._project(v)

    @torch.no_grad()
    def _project(self, v: Tensor) -> None:
        """Bring ‖v_i‖_p to ρ, where it is not 0.

        What the optimizer keeps stays: its gradients were all taken at this norm.
        """
        local = local_part(v)
        if self.hidden.is_zero_somewhere(v, self.form):
            projected = normalise_channels(local, self.rho, *self.form)
        else:
            (projected,) = normalise_together([local], [self.rho], [self.form])
        local.copy_(projected)
        self.hidden.note_change(v)

    def train(self, mode: bool = True) -> "WeightNorm":
        """Forget w, too: weights may have been exchanged, for averages of them say."""
        self.hidden.forget()
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
        own = {"hidden": None, "_pass": None}
        copied.__dict__.update(copy.deepcopy({**self.__dict__, **own}, memo))
        together = memo.setdefault(id(self._pass), WeightPass())
        copied._join(together, [memo[id(h)] for h in self.hidden.holders if id(h) in memo])
        return copied

    def extra_repr(self) -> str:
        """Return the settings."""
        by_channel = "" if self.gain is None else f", gain of {len(self.gain)}"
        settings = self.settings
        return (
            f"p={settings.p:g}, rho={float(self.rho):.4g}{by_channel}, project={settings.project}"
        )


def _is_recorded() -> bool:
    """Return whether operations are being recorded or transformed: compiled, exported, vmapped."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
    )


def _is_captured(v: Tensor) -> bool:
    """Return whether a CUDA graph is being made, which has to hold the computation of w."""
    return v.is_cuda and torch.cuda.is_current_stream_capturing()


def _power_mean(norms: Tensor, p: float) -> Tensor:
    """Return ‖V‖_p / N^(1/p), of the N channels that are not zero."""
    count = (norms > 0).sum().clamp(min=1)
    whole: Tensor = torch.linalg.vector_norm(norms, p) / count ** (1 / p)
    return whole
