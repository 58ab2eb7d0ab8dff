"""WeightNorm: computes the weight w of a layer from its unnormalised weight v."""

import math
import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from nmlightning.errors import InputError, check_choice, check_flag, is_number
from nmlightning.kernels.dispatch import weight_kernels
from nmlightning.parametrizations.normalize import (
    is_recorded,
    normalise_channels,
    normalise_weight,
    normalise_weights,
)
from nmlightning.weights.channel_norms import (
    ROWS,
    ChannelLayout,
    channel_norms,
    gather_channels,
    is_sharded,
    local_part,
)

Kind = Literal["weight", "bounded"]
Gain = Literal["none", "layer", "channel"]

NOTE = "nmlightning_weight_norm"
NAMES = {1.0: "L1", 2.0: "L2", math.inf: "L∞"}
_GAINS: dict[Kind, tuple[Gain, ...]] = {
    "bounded": ("none", "channel"),
    "weight": ("channel", "layer"),
}


@dataclass(frozen=True)
class Settings:
    """The arguments of `apply_weight_norm`; `rho` is None for "init"."""

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
        try:
            order = float(p)
        except (TypeError, ValueError):
            order = math.nan
        if isinstance(p, bool) or order not in NAMES:
            raise InputError(f"p is 1, 2 or inf, got {p!r}.")
        if rho != "init" and not (is_number(rho) and 0 < float(rho) < math.inf):
            raise InputError(f"rho is 'init' or a positive number, got {rho!r}.")
        constant = None if rho == "init" else float(rho)
        return cls(kind, order, constant, gain, check_flag("project", project))

    def as_plain(self) -> dict[str, Any]:
        """Return the arguments of `of` that give these settings."""
        return {**asdict(self), "rho": self.rho or "init"}


class WeightNorm(nn.Module):
    """The parametrization of one weight; `apply_weight_norm` makes and registers it.

        w_i = s_i v_i / ‖v_i‖_p

    | kind | gain | s_i | learned |
    |---|---|---|---|
    | bounded | none | ρ | v |
    | bounded | channel | g_i ‖g⁰‖₂ / ‖g‖₂ | v, g |
    | weight | channel | g_i | v, g |
    | weight | layer | g | v, g |

    It is computed at each read; inside `torch.nn.utils.parametrize.cached()` once, also where the
    weight is tied, and with kernels once a forward of the model (`JointForward`).

    Args:
        v: the weight as it is before; its norms give ρ and g where `rho` does not.
        settings: of the norm; a g_i begins as ‖v_i‖_p and one g for a layer as ρ, or as `rho`.
        layout: where the output channels are.

    Attributes:
        rho: ρ, in float32 at least, as `initial_gain_norm` is, whatever the module is cast to.
        order: p, so that a state dict with another is refused.
        gain: g, (C,) or (1,), in the dtype of v, and trained where v is.
        initial_gain_norm: ‖g⁰‖₂, of a bounded layer with gains.
        positions: which of its module's parameters the weight was, in each layer that it is in.
    """

    rho: Tensor
    order: Tensor
    gain: nn.Parameter | None
    initial_gain_norm: Tensor | None

    def __init__(self, v: Tensor, settings: Settings, layout: ChannelLayout = ROWS) -> None:
        super().__init__()
        self.settings, self.form = settings, (settings.p, layout)
        norms = channel_norms(v, *self.form)
        if settings.rho is not None:
            norms = torch.full_like(norms, settings.rho)
        self.register_buffer("rho", _power_mean(norms, settings.p))
        self.register_buffer("order", torch.full_like(self.rho, settings.p))
        self.register_parameter("gain", None)
        if settings.gain != "none":
            gains = norms if settings.gain == "channel" else self.rho.reshape(1)
            self.gain = nn.Parameter(gains.to(v.dtype, copy=True), requires_grad=v.requires_grad)
        bounded = self.gain is not None and settings.kind == "bounded"
        whole = torch.linalg.vector_norm(norms) if bounded else None
        self.register_buffer("initial_gain_norm", whole)
        self.positions: list[int] = []
        self.is_registered = False

    def forward(self, v: Tensor) -> Tensor:
        if is_recorded():
            return self.compute(v, normalise_channels)
        if not parametrize._cache_enabled:
            return self.compute(v, normalise_weight)
        # Torch keeps a weight for each layer that it is in; this one is for all of them.
        key = id(self), f"with gradients: {torch.is_grad_enabled()}"
        w = parametrize._cache.get(key)
        if w is None:
            w = self.compute(v, partial(normalise_weight, is_kept=True))
            parametrize._cache[key] = w
        return w

    @property
    def source(self) -> Tensor:
        """What its scales are computed from: g, or else ρ."""
        gain = self._parameters["gain"]
        return self._buffers["rho"] if gain is None else gain  # type: ignore[return-value]

    def compute(self, v: Tensor, normalise: Callable[..., Tensor]) -> Tensor:
        scales = self.source
        if self._buffers["initial_gain_norm"] is not None:
            scales = normalise(scales[None], self.initial_gain_norm, 2)[0]
        return normalise(v, scales, *self.form)

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

        Until it is registered g stays, too: `rho` may have set it.
        """
        if self.gain is not None and self.is_registered:
            norms = channel_norms(w, *self.form)
            by_channel = self.settings.gain == "channel"
            self.gain.copy_(norms if by_channel else _power_mean(norms, self.settings.p))
        return w

    def _apply(self, fn: Any, recurse: bool = True) -> "WeightNorm":
        """Leave ρ and ‖g⁰‖ exact where the module is cast to half."""
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in exact.items():
            after = getattr(self, name)
            if torch.finfo(after.dtype).bits < 32:
                setattr(self, name, before.to(after.device))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Say in the metadata, too, how the weight is normalised."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        own = getattr(destination, "_metadata", {}).setdefault(prefix[:-1], {})
        own[NOTE] = self.settings.as_plain()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        saved, p = state_dict.get(prefix + "order"), self.settings.p
        if saved is not None and float(saved) != p:
            theirs, where = f"L{float(saved):g}".replace("inf", "∞"), prefix.rstrip(".")
            lists[-1].append(f"{where} was normalised by {theirs} there, here it is by {NAMES[p]}.")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)

    def extra_repr(self) -> str:
        known, rho = self.settings, f"rho={float(self.rho):.4g}"
        settings = f"kind={known.kind!r}, p={known.p:g}, {rho}, gain={known.gain!r}"
        return f"{settings}, project={known.project}"


def _power_mean(norms: Tensor, p: float) -> Tensor:
    """Return ‖V‖_p / N^(1/p), of the N channels that are not zero."""
    count = (norms > 0).sum().clamp(min=1)
    whole: Tensor = torch.linalg.vector_norm(norms, p) / count ** (1 / p)
    return whole


class FastParametrizationList(ParametrizationList):
    """A `ParametrizationList` with a fast path for one parametrization."""

    def forward(self) -> Tensor:
        if len(self._modules) > 1:
            return super().forward()
        return self._modules["0"](self._parameters["original"])  # type: ignore[no-any-return]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        register_post_step(self)

    @torch.no_grad()
    def project(self) -> None:
        """Bring ‖v_i‖_p to ρ, where it is not 0.

        What the optimizer keeps stays: its gradients were all taken at this norm.

        Raises:
            InputError: channels are split over ranks, as those of a transposed convolution are.
        """
        v, norm = self._parameters["original"], self._modules["0"]
        assert isinstance(v, Tensor)
        assert isinstance(norm, WeightNorm)
        if is_sharded(v):
            channel_norms(v, *norm.form)  # raises where they are split
        local = local_part(v)
        local.copy_(normalise_weight(local, norm.rho, *norm.form))


class JointForward:
    """Hooks of a module: in its forward, one call of kernels computes the weights.

    These are the weights that its last forward read, at the first read of one; any other is
    computed alone. A weight is computed once a forward, unless what it is computed from changes.
    """

    def __init__(self) -> None:
        self._last: list[FastParametrizationList] = []
        self._read: dict[Any, FastParametrizationList] = {}
        # Of each norm the weight, what it was computed from, and their identities and versions.
        self._made: dict[Any, tuple[Tensor, tuple[Tensor, Tensor], tuple[int, ...]]] = {}

    def __deepcopy__(self, memo: Any) -> "JointForward":
        return JointForward()

    @classmethod
    def watch(cls, module: nn.Module) -> None:
        cls.unwatch(module)
        joint = cls()
        module.register_forward_pre_hook(joint.begin)
        module.register_forward_hook(joint.end, always_call=True)

    @staticmethod
    def unwatch(module: nn.Module) -> None:
        hooked: list[dict[int, Any]] = [module._forward_pre_hooks, module._forward_hooks]
        for hooks in hooked:
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), JointForward):
                    del hooks[key]

    def begin(self, *_: Any) -> None:
        """Begin, unless around this module another began, or processes reduce single gradients."""
        if is_recorded() or _FORWARD.get() not in (None, self):
            return
        if weight_kernels() is None and weight_kernels("cuda") is None:
            return
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            self._read, self._made = {}, {}
            _FORWARD.set(self)

    def end(self, *_: Any) -> None:
        """Forget the weights, and remember which they were."""
        if not is_recorded() and _FORWARD.get() is self:
            _FORWARD.set(None)
            self._last, self._read, self._made = list(self._read.values()), {}, {}

    def weight_of(self, computed: FastParametrizationList) -> Tensor | None:
        """Return a weight, or None if it is not for the kernels."""
        if self._last:
            together, self._last = self._last, []
            self._compute(together)
        norm: Any = computed._modules["0"]
        v: Any = computed._parameters["original"]
        source, made = norm.source, self._made.get(norm)
        if v.is_inference() or source.is_inference():
            return None
        needs_grad = torch.is_grad_enabled() and (v.requires_grad or source.requires_grad)
        state = id(v), v._version, id(source), source._version
        if made is None or made[2] != state or (needs_grad and not made[0].requires_grad):
            self._made.pop(norm, None)
            self._compute([computed])
            made = self._made.get(norm)
            if made is None:
                return None
        self._read[norm] = computed
        w = made[0]
        return w if needs_grad == w.requires_grad else w.detach()

    def _compute(self, lists: Sequence[FastParametrizationList]) -> None:
        norms: list[Any] = [computed._modules["0"] for computed in lists]
        vs: list[Any] = [computed._parameters["original"] for computed in lists]
        sources = [norm.source for norm in norms]
        scales, wholes = [*sources], [norm._buffers["initial_gain_norm"] for norm in norms]
        bounded = [k for k, whole in enumerate(wholes) if whole is not None]
        if bounded:
            gains = normalise_weights(
                [scales[k] for k in bounded],
                [wholes[k] for k in bounded],
                [(2.0, ROWS)] * len(bounded),
            )
            if not gains:
                return
            for k, gain in zip(bounded, gains, strict=True):
                scales[k] = gain
        ws = normalise_weights(vs, scales, [norm.form for norm in norms])
        for norm, w, v, source in zip(norms, ws, vs, sources, strict=False):
            self._made[norm] = w, (v, source), (id(v), v._version, id(source), source._version)


_FORWARD: ContextVar[JointForward | None] = ContextVar("joint_forward", default=None)


def fast_property(read: property, name: str) -> property:
    """Return torch's property of a parametrized tensor, with a fast path to our parametrization."""

    def get(module: nn.Module) -> Any:
        computed: Any = module._modules["parametrizations"]._modules[name]  # type: ignore[union-attr]
        if not (is_recorded() or parametrize._cache_enabled or len(computed._modules) > 1):
            joint = _FORWARD.get()
            w = None if joint is None else joint.weight_of(computed)
            v = computed._parameters["original"]
            return computed._modules["0"].compute(v, normalise_weight) if w is None else w
        return read.fget(module)  # type: ignore[misc]

    return property(get, read.fset)


# Torch calls hooks of one optimizer or of all. Weights are projected under optimizers that are made
# later, so it is the latter, set once for the process.
_PROJECTED: "weakref.WeakSet[FastParametrizationList]" = weakref.WeakSet()
_HOOK: list[Any] = []


def register_post_step(computed: FastParametrizationList) -> None:
    """Project v after each step of an optimizer that moves it, if that is set, while it lives."""
    norm = computed._modules["0"]
    if isinstance(norm, WeightNorm) and norm.settings.project:
        if not _HOOK:
            _HOOK.append(register_optimizer_step_post_hook(_after_step))
        _PROJECTED.add(computed)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    del args, kwargs
    if _PROJECTED and {x.get("lr") for x in optimizer.param_groups} != {0}:  # as torch loads state
        moved = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        tied = {computed._parameters["original"]: computed for computed in _PROJECTED}
        for v, computed in tied.items():
            if v in moved:
                computed.project()
