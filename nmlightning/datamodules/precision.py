"""The floating-point type in which a model wants its images."""

import pytorch_lightning as pl
import torch


def input_dtype(trainer: pl.Trainer | None) -> torch.dtype:
    """Return the type of the trained module: float32, unless the precision is `16-true` or so."""
    dtype = trainer.lightning_module.dtype if trainer else torch.float32
    assert isinstance(dtype, torch.dtype)
    return dtype
