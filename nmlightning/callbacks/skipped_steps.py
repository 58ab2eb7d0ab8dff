"""Counts the optimizer steps that a GradScaler skipped."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer


class SkippedSteps:
    """Counts, without waiting for the device, the steps that 16-bit mixed precision skipped.

    A GradScaler does not call an optimizer whose gradients overflowed; one that is fused it calls
    all the same, with the finding on the device.

    Args:
        trainer: whose optimizers are watched, if its precision has a GradScaler.

    Attributes:
        watches: whether there is a GradScaler.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self.watches = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._missed = 0  # attempts that the optimizer never saw
        self._found_on_device: Tensor | None = None
        optimizers = trainer.optimizers if self.watches else []
        self._hooks = [o.register_step_post_hook(self._note) for o in optimizers]

    def attempt(self) -> None:
        """Count a step that is about to be taken."""
        self._missed += 1

    def count(self) -> Tensor:
        """Return how many of the attempted steps were skipped, on the device."""
        missed = torch.tensor(float(self._missed))
        found = self._found_on_device
        return missed if found is None else missed.to(found.device) + found

    def resume_from(self, count: int) -> None:
        """Begin with the steps that were skipped before a resume."""
        self._missed += count

    def remove(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()

    def _note(self, optimizer: Optimizer, *_: Any) -> None:
        self._missed -= 1
        found = getattr(optimizer, "found_inf", None)
        if found is not None:
            skipped = found.detach().clone().reshape(())
            earlier = self._found_on_device
            self._found_on_device = skipped if earlier is None else earlier + skipped
