"""What happens to normalised weights after every step of any optimizer."""

import weakref
from collections.abc import Container
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class Kept(Protocol):
    """Something that wants to know of optimizer steps."""

    def after_step(self, moved: Container[Tensor]) -> None:
        """Do what is due after a step of an optimizer that moves these parameters."""


_KEPT: "weakref.WeakSet[Kept]" = weakref.WeakSet()
_HOOK: list[Any] = []


def keep_up(kept: Kept) -> None:
    """Call its `after_step` after each step of every optimizer, for as long as it lives.

    Optimizers may be made before or after, and a copy of a model has its own.
    """
    if not _HOOK:
        _HOOK.append(register_optimizer_step_post_hook(_after_step))
    _KEPT.add(kept)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    del args, kwargs
    if _KEPT:
        moved = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for kept in tuple(_KEPT):
            kept.after_step(moved)
