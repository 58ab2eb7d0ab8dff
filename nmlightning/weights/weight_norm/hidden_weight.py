"""What is known of the hidden weight v of a weight norm for as long as nothing changes it."""

import weakref
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.parametrize import ParametrizationList


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
