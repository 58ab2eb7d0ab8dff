"""Epochs of training by Lightning's Trainer and by a bare loop, which take turns.

The loop is what one writes for speed alone: the images lie on the device, a batch is one gather
from the unfolded padded set, and nothing is logged. It runs inside the fit, between the Trainer's
epochs: in every round one of the two, drawn anew, comes first.
"""

import copy
import random
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from nmlightning import CIFAR10, ImageClassifier
from nmlightning.datamodules.cifar10 import MEAN, STD
from nmlightning.datamodules.image_data import LabelledImages


class TakeTurns(pl.Callback):
    """Times the epochs of a fit and, between them, those of a loop."""

    def __init__(self, loop: Callable[[], object]) -> None:
        self.loop = loop
        self.times: dict[str, list[float]] = {"trainer": [], "loop": []}
        self._started: float | None = None
        self._loop_is_due = False

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish_round()
        self._loop_is_due = random.random() < 0.5
        if not self._loop_is_due:
            self._time_loop()
        self._started = _now()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish_round()

    def _finish_round(self) -> None:
        if self._started is not None:
            self.times["trainer"].append(_now() - self._started)
            if self._loop_is_due:
                self._time_loop()

    def _time_loop(self) -> None:
        started = _now()
        self.loop()
        self.times["loop"].append(_now() - started)


def time_epochs(
    net: nn.Module, data: CIFAR10, rounds: int, device: str, compiled: str | None
) -> dict[str, list[float]]:
    """Return the seconds of an epoch of each in each round, in bf16, after two that warm up."""
    turns = TakeTurns(make_loop(copy.deepcopy(net), data, device, compiled, torch.bfloat16))
    trainer = make_trainer(device, rounds + 2, turns, limit_val_batches=0)
    trainer.fit(ImageClassifier(net, _make_optimizer, compile=compiled), data)
    return {name: taken[2:] for name, taken in turns.times.items()}


def make_trainer(device: str, epochs: int, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """Return a Trainer in bf16 that says and keeps nothing."""
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = {**dict.fromkeys(off, False), "precision": "bf16-mixed", **options}
    accelerator = "gpu" if device == "cuda" else device
    given = {"accelerator": accelerator, "devices": 1, "max_epochs": epochs}
    return pl.Trainer(**given, callbacks=list(callbacks), **options)


def make_loop(
    net: nn.Module,
    data: CIFAR10,
    device: str,
    compiled: str | None = None,
    autocast: torch.dtype | None = None,
) -> Callable[[], None]:
    """Return an epoch of training without anything around it."""
    assert isinstance(data.train, LabelledImages)
    pad, size = data.augmentation.pad, data.image_shape[-1]
    padded = F.pad(data.train.images.to(device), (pad,) * 4)
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)
    labels = data.train.labels.to(device)
    mean, std = (255 * torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))
    net = net.to(device).train()
    if compiled is not None:
        net.compile(mode=compiled, dynamic=False)
    optimizer = _make_optimizer(net.parameters())

    def run() -> None:
        length, batch = len(labels), data.batch_size
        order = torch.randperm(length, device=device)
        tops, lefts = torch.randint(2 * pad + 1, (2, length), device=device)
        flips = torch.rand(length, 1, 1, 1, device=device) < 0.5
        for start in range(0, length - batch + 1, batch):
            part = slice(start, start + batch)
            images = windows[order[part], :, tops[part], lefts[part]]
            images = (torch.where(flips[part], images.flip(-1), images) - mean) / std
            with torch.autocast(device, autocast, enabled=autocast is not None):
                loss = F.cross_entropy(net(images), labels[order[part]])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

    return run


def _make_optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
