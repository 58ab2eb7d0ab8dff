"""What is known of the hidden weight v of a weight norm from one optimizer step to the next."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.parametrize import ParametrizationList

from nmlightning.weights.channel_norms import ChannelLayout, channel_norms
from nmlightning.weights.shards import local_part
from nmlightning.weights.weight_norm.ways import Form, as_column


class Holder(ParametrizationList):
    """What has v, and returns w with less ado than a list of several parametrizations."""

    def forward(self) -> Tensor:
        """Return w."""
        if len(self._modules) > 1:
            return super().forward()
        return self._modules["0"](self._parameters["original"])  # type: ignore[no-any-return]


class HiddenWeight:
    """v, where it is, and w as long as nothing changed.

    Attributes:
        is_stepped: whether an optimizer moved v or g before. Until then it may be something else
            that changes them, unseen by torch, and w is not kept.
    """

    __slots__ = ("_column", "_has_zeros", "_holders", "_kept", "_looked_at", "is_stepped")

    def __init__(self, holders: Iterable[ParametrizationList] = ()) -> None:
        self._holders = [weakref.ref(holder) for holder in holders]
        self._kept: tuple[Tensor, Tensor, Any, tuple[Any, ...]] | None = None
        self._has_zeros, self._looked_at = False, (0, -1)
        self._column: tuple[Any, Tensor] | None = None
        self.is_stepped = False

    @property
    def holders(self) -> list[ParametrizationList]:
        """What has v; several where it is tied."""
        return [holder for holder in (ref() for ref in self._holders) if holder is not None]

    @property
    def value(self) -> Tensor | None:
        """V, or None if nothing has it any more."""
        for ref in self._holders:
            holder = ref()
            if holder is not None:
                return holder._parameters["original"]
        return None

    def column(self, rho: Tensor, v: Tensor, layout: ChannelLayout) -> Tensor:
        """Return `as_column` of ρ, made once."""
        made, key = self._column, (id(rho), rho._version, rho.data_ptr(), v.shape)
        if made is None or made[0] != key:
            with torch.inference_mode(mode=False):
                self._column = made = key, as_column(rho, v, layout)
        return made[1]

    def weight(self, v: Tensor, gain: Tensor | None) -> Tensor | None:
        """Return the w that was kept, if nothing changed that torch sees."""
        kept = self._kept
        return kept[0] if kept and kept[1] is v and kept[3] == _state(v, gain) else None

    def keep(self, w: Tensor, v: Tensor, gain: Tensor | None) -> None:
        """Keep w, and the storage of v, so that another cannot have its address."""
        self._kept = w, v, v.untyped_storage(), _state(v, gain)

    def forget(self) -> None:
        """Keep w no longer."""
        self._kept = None

    @torch.no_grad()
    def is_zero_somewhere(self, v: Tensor, form: Form) -> bool:
        """Return whether v has a channel of zeros, by which the fast ways would divide.

        An optimizer step makes none; after any other change that torch sees, it is looked for.
        """
        if self._looked_at != (id(v), v._version):
            self._has_zeros = not bool(channel_norms(local_part(v), *form).all())
            self.note_change(v)
        return self._has_zeros

    def note_change(self, v: Tensor) -> None:
        """Note that v was changed by what makes no channel zero."""
        self._looked_at = id(v), v._version


def _state(v: Tensor, gain: Tensor | None) -> tuple[Any, ...]:
    own = v._version, v.data_ptr(), v.requires_grad
    return own if gain is None else (*own, gain._version, gain.data_ptr(), gain.requires_grad)
