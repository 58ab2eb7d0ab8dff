"""All normalised weights of a model, computed together and kept until the next optimizer step."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nmlightning.weights.channel_norms import ROWS
from nmlightning.weights.weight_norm.normalised_weights import Form, normalise_together


class Member(Protocol):
    """What takes part in a pass: a `WeightNorm`."""

    gain: Any
    rho: Any
    initial_gain_norm: Any
    form: Form
    kept: "Kept | None"

    def waiting(self, device: torch.device) -> Tensor | None:
        """Return v, if w may be kept and is on the device."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A weight w, and what it was computed from.

    The storage of v is held, so that another cannot have its address. An exchange of `v.data`
    for another tensor is seen so, a change in place through `.data` is not.
    """

    w: Tensor
    v: Tensor
    storage: Any
    state: tuple[Any, ...]

    def is_of(self, member: Member, v: Tensor) -> bool:
        """Return whether nothing changed that torch sees."""
        return self.v is v and self.state == _state(member, v)


def _state(member: Member, v: Tensor) -> tuple[Any, ...]:
    gain = member.gain
    of_gain = None if gain is None else (gain._version, gain.data_ptr(), gain.requires_grad)
    return v._version, v.data_ptr(), v.requires_grad, of_gain


class WeightPass:
    """Computes the weights of its members at the first read of any, and keeps them.

    An optimizer step drops them.
    """

    def __init__(self) -> None:
        self.members: weakref.WeakSet[Any] = weakref.WeakSet()

    def weight(self, member: Member, v: Tensor) -> Tensor:
        """Return w of a member, whose hidden weight is v."""
        if member.kept is None or not member.kept.is_of(member, v):
            self._compute(*self._due(member, v))
        assert member.kept is not None
        return member.kept.w

    def _due(self, member: Member, v: Tensor) -> tuple[list[Member], list[Tensor]]:
        """Return the members to compute now, and their v.

        Between ranks it is one at a time, so that gradients can be sent while others are computed.
        """
        if member.waiting(v.device) is not v or _has_ranks():
            return [member], [v]
        due = [(other, other.waiting(v.device)) for other in self.members]
        stale = [
            (other, hidden)
            for other, hidden in due
            if hidden is not None and not (other.kept and other.kept.is_of(other, hidden))
        ]
        members, vs = zip(*stale, strict=True)
        return list(members), list(vs)

    def _compute(self, members: Sequence[Member], vs: Sequence[Tensor]) -> None:
        weights = compute_weights(members, vs)
        for member, v, w in zip(members, vs, weights, strict=True):
            member.kept = Kept(w, v, v.untyped_storage(), _state(member, v))


def compute_weights(members: Sequence[Member], vs: Sequence[Tensor]) -> list[Tensor]:
    """Return w of each member from its v."""
    return normalise_together(vs, _compute_scales(members), [member.form for member in members])


def _compute_scales(members: Sequence[Member]) -> list[Tensor]:
    """Return s of each, (C,) or one element: the norms of w but for their sign."""
    scales = [member.rho if member.gain is None else member.gain for member in members]
    # The gains of a bounded layer are one vector, whose norm stays.
    bounded = [i for i, member in enumerate(members) if member.initial_gain_norm is not None]
    if bounded:
        totals = [members[i].initial_gain_norm for i in bounded]
        gains = normalise_together(
            [scales[i] for i in bounded], totals, [(2.0, ROWS)] * len(totals)
        )
        for i, gain in zip(bounded, gains, strict=True):
            scales[i] = gain
    return scales


def _has_ranks() -> bool:
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )
