"""What happens to normalised weights after every step of any optimizer.

Torch calls hooks of one optimizer or of all; weights are to be right under optimizers that are made
later, so it is the latter, set once for the process, and what it serves is held weakly.
"""

import weakref
from collections.abc import Container
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


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
