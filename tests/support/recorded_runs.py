"""Short runs of a small net that is recorded or steered, for tests of their clock and files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import lightning_modules
from trainers import quiet_trainer

BATCHES = 4


class Trains(lightning_modules.Trains, pl.LightningModule):
    """Starts from the same weights each time."""

    def build(self) -> None:
        torch.manual_seed(1)
        super().build()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class StepsByHand(Trains):
    """Steps its optimizers, one for convolutions and one for the rest, at every N-th batch."""

    def __init__(self, every: int = 1, optimizers: int = 2) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.every, self.number = every, optimizers

    def configure_optimizers(self) -> Any:
        parts: list[list[Tensor]] = [[] for _ in range(self.number)]
        for parameter in self.parameters():
            parts[0 if parameter.dim() == 4 else -1].append(parameter)
        return [torch.optim.SGD(part, lr=0.05, momentum=0.9) for part in parts]

    def training_step(self, batch: list[Tensor], index: int) -> None:
        self.manual_backward(super().training_step(batch, index))
        if index % self.every == self.every - 1:
            optimizers: Any = self.optimizers()
            for optimizer in optimizers if self.number > 1 else [optimizers]:
                optimizer.step()
                optimizer.zero_grad()


class Unsized(IterableDataset[Any]):
    """Images without a number of them."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)


def make_data(batches: int = BATCHES, *, sized: bool = True) -> DataLoader[Any]:
    """Return batches of four images."""
    data: Any = lightning_modules.make_data(batches)
    return data if sized else DataLoader(Unsized(data.dataset), batch_size=4)


def make_trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """Return a quiet Trainer for one epoch."""
    return quiet_trainer(*callbacks, default_root_dir=folder, **options)
