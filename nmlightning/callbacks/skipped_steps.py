"""How many optimizer steps a GradScaler left out since gradients overflowed."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    import pytorch_lightning as pl


class SkippedSteps:
    """Counts, without waiting for the device, the steps that 16-bit mixed precision skipped.

    A GradScaler does not call an optimizer whose gradients overflowed; one that is fused it calls
    all the same, with the finding on the device.

    Args:
        trainer: whose optimizers are watched, if its precision has a GradScaler.

    Attributes:
        watches: whether there is a GradScaler.
    """

    def __init__(self, trainer: "pl.Trainer") -> None:
        self.watches = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._attempted = 0
        self._called = 0
        self._found_on_device: Tensor | None = None
        optimizers = trainer.optimizers if self.watches else []
        self._hooks = [o.register_step_post_hook(self._note) for o in optimizers]

    def attempt(self) -> None:
        """Count a step that is about to be taken."""
        self._attempted += 1

    def count(self) -> Tensor:
        """Return how many of the attempted steps were skipped, on the device."""
        called = torch.tensor(float(self._attempted - self._called))
        found = self._found_on_device
        return called if found is None else called.to(found.device) + found

    def remove(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()

    def _note(self, optimizer: Optimizer, *_: Any) -> None:
        self._called += 1
        found = getattr(optimizer, "found_inf", None)
        if found is not None:
            skipped = found.detach().clone().reshape(())
            earlier = self._found_on_device
            self._found_on_device = skipped if earlier is None else earlier + skipped
