"""Counts the optimizer steps that a GradScaler skipped, for the progress bar, logs and report."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning import Callback
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


class SkippedStepCount(Callback):
    """Logs `train/skipped_steps` after each epoch, where a GradScaler may skip any.

    It is the number of optimizer steps since training began, also before a resume, that were left
    out since gradients overflowed in half precision. A few at the start, while the scale is found,
    are normal; a number that keeps growing is not.
    """

    def __init__(self) -> None:
        self._earlier = 0
        self._skipped: SkippedSteps | None = None

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Watch the optimizers of a precision that has a GradScaler."""
        skipped = SkippedSteps(trainer)
        if skipped.watches:
            skipped.resume_from(self._earlier)
            self._skipped = skipped

    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Any
    ) -> None:
        """Count a step that is about to be taken."""
        if self._skipped is not None:
            self._skipped.attempt()

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Log the count, for which the device is waited for."""
        if self._skipped is not None:
            pl_module.log("train/skipped_steps", self._skipped.count(), prog_bar=True)

    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Stop watching."""
        if self._skipped is not None:
            self._earlier = int(self._skipped.count())
            self._skipped.remove()
            self._skipped = None

    def state_dict(self) -> dict[str, Any]:
        """Return the count that a resumed run starts from."""
        count = self._earlier if self._skipped is None else int(self._skipped.count())
        return {"skipped_steps": count}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from there."""
        self._earlier = state_dict["skipped_steps"]
