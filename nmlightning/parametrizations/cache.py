"""Normalised weights of a model, computed together and kept until the next optimizer step.

Torch calls hooks of one optimizer or of all; weights are to be right under optimizers that are made
later, so it is the latter, set once for the process, and what it serves is held weakly.
"""

import weakref
from collections.abc import Container, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from nmlightning.parametrizations.normalize import Form, normalise_together
from nmlightning.weights.channel_norms import ROWS


class HiddenWeight:
    """Where v is, and w for as long as nothing changed.

    Attributes:
        is_stepped: whether an optimizer moved v or g before. Until then it may be something else
            that changes them, unseen by torch, and w is not kept.
    """

    __slots__ = ("_holders", "_kept", "is_stepped")

    def __init__(self) -> None:
        self._holders: list[weakref.ref[ParametrizationList]] = []
        self._kept: tuple[Any, ...] | None = None
        self.is_stepped = False

    def add_holder(self, holder: ParametrizationList) -> None:
        """Note what has v; there are several where it is tied."""
        self._holders.append(weakref.ref(holder))

    @property
    def value(self) -> Tensor | None:
        """V, or None if nothing has it (yet, or any more)."""
        for ref in self._holders:
            holder = ref()
            if holder is not None:
                return holder._parameters["original"]
        return None

    def weight(self, *sources: Tensor) -> Tensor | None:
        """Return the w that was kept, if nothing changed that torch sees.

        One that was computed without gradients is not for a forward pass with them.

        Args:
            *sources: v, then whatever else w is computed from.
        """
        kept = self._kept
        is_same = kept is not None and kept[1] is sources[0] and kept[3] == _state(kept[0], sources)
        return kept[0] if kept is not None and is_same else None

    def keep(self, w: Tensor, *sources: Tensor) -> None:
        """Keep w, and the storage of v, so that another cannot have its address."""
        v = sources[0]
        self._kept = w, v, v.untyped_storage(), _state(w, sources)

    def forget(self) -> None:
        """Keep w no longer."""
        self._kept = None

    def is_moved(self, gain: Tensor | None, moved: Container[Tensor]) -> bool:
        """Return whether v or g is among what an optimizer moves."""
        return self.value in moved or (gain is not None and gain in moved)


def _state(w: Tensor, sources: tuple[Tensor, ...]) -> list[Any]:
    changes = [(x._version, x.data_ptr(), x.requires_grad) for x in sources]
    return [torch.is_grad_enabled(), w._version, *changes]


class Served(Protocol):
    """Something that wants to know of optimizer steps."""

    def after_step(self, moved: Container[Tensor]) -> None:
        """Do what is due after a step of an optimizer that moves these parameters."""


_SERVED: "weakref.WeakSet[Served]" = weakref.WeakSet()
_HOOK: list[Any] = []


def serve_after_steps(served: Served) -> None:
    """Call its `after_step` after each step of every optimizer, for as long as it lives."""
    if not _HOOK:
        _HOOK.append(register_optimizer_step_post_hook(_after_step))
    _SERVED.add(served)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    del args, kwargs
    if _SERVED:
        moved = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for served in tuple(_SERVED):
            served.after_step(moved)


class Member(Protocol):
    """What takes part in a pass: a `WeightNorm`."""

    gain: Any
    initial_gain_norm: Any
    form: Form
    hidden: HiddenWeight

    def sources(self, v: Tensor) -> tuple[Tensor, ...]:
        """Return v and what else w is computed from."""

    def fixed_scales(self, v: Tensor) -> Tensor:
        """Return ρ for each channel."""

    def waiting(self, device: torch.device) -> Tensor | None:
        """Return v, if w may be kept and is on the device."""

    def after_own_step(self, moved: Container[Tensor]) -> None:
        """Do what is due after an optimizer moved v or g."""


class WeightPass:
    """Computes the weights of all members at the first read of any, which keep them."""

    def __init__(self) -> None:
        self._members: weakref.WeakSet[Any] = weakref.WeakSet()
        serve_after_steps(self)

    def add(self, member: Member) -> None:
        """Let a weight norm take part, for as long as it lives."""
        self._members.add(member)

    def compute(self, member: Member, v: Tensor) -> Tensor:
        """Return w of a member whose hidden weight is v, and compute those of others that wait.

        Between ranks it is one at a time, so that gradients can be sent while others are computed.
        """
        alone = member.waiting(v.device) is not v or _has_ranks()
        due = [(member, v)] if alone else self._due(v.device)
        members, vs = zip(*due, strict=True)
        for other, hidden, w in zip(members, vs, compute_weights(members, vs), strict=True):
            other.hidden.keep(w, *other.sources(hidden))
            if other is member:
                own = w
        return own

    def _due(self, device: torch.device) -> list[tuple[Member, Tensor]]:
        waiting = ((member, member.waiting(device)) for member in self._members)
        return [
            (member, v)
            for member, v in waiting
            if v is not None and member.hidden.weight(*member.sources(v)) is None
        ]

    def after_step(self, moved: Container[Tensor]) -> None:
        """Forget the weights, if one of them was moved."""
        stepped = [m for m in self._members if m.hidden.is_moved(m.gain, moved)]
        for member in self._members if stepped else ():
            member.hidden.forget()
        for member in stepped:
            member.after_own_step(moved)


def compute_weights(members: Sequence[Member], vs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return w of each member from its v."""
    scales = _compute_scales(members, vs)
    return normalise_together(vs, scales, [member.form for member in members])


def _compute_scales(members: Sequence[Member], vs: Sequence[Tensor]) -> list[Tensor]:
    """Return s of each: the norms of w but for their sign."""
    scales = [
        member.fixed_scales(v) if member.gain is None else member.gain
        for member, v in zip(members, vs, strict=True)
    ]
    totals = [member.initial_gain_norm for member in members]
    for indices in _by_length(scales, totals):
        bounded = _bound_gains([scales[i] for i in indices], [totals[i] for i in indices])
        for i, gain in zip(indices, bounded, strict=True):
            scales[i] = gain
    return scales


def _by_length(gains: Sequence[Tensor], totals: Sequence[Tensor | None]) -> Iterable[list[int]]:
    """Return the numbers of the gains that have a norm to keep, those of one kind together."""
    kinds: dict[Any, list[int]] = {}
    for i, (gain, total) in enumerate(zip(gains, totals, strict=True)):
        if total is not None:
            kinds.setdefault((gain.shape, gain.dtype, gain.requires_grad), []).append(i)
    return kinds.values()


def _bound_gains(gains: Sequence[Tensor], totals: Sequence[Any]) -> Sequence[Tensor]:
    """Return g ‖g⁰‖₂ / ‖g‖₂ of gains of one length: those of a bounded layer are one vector."""
    together, norms = torch.stack(list(gains)), torch.stack(list(totals))
    return normalise_together([together], [norms], [(2.0, ROWS)])[0].unbind()


def _has_ranks() -> bool:
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )
