"""A Trainer that says and keeps nothing, and a checkpoint at a step."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from nmlightning.compat import CallbackBase

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def quiet_trainer(*callbacks: Any, **options: Any) -> pl.Trainer:
    """Return a Trainer on the CPU, for one epoch."""
    return pl.Trainer(**{"max_epochs": 1, "callbacks": list(callbacks), **QUIET, **options})


class SaveAt(CallbackBase):  # type: ignore[misc]
    """Writes a checkpoint when a number of steps is done, in the hook `when`."""

    def __init__(self, step: int, path: Path, when: str = "on_train_batch_end") -> None:
        self.step = step
        self.path = path
        setattr(self, when, self.save)

    def save(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
