"""Runs that are resumed, and are bit for bit what they would have been.

As a script it is one of two ranks, which train in a folder: `python test_exact_resume.py FOLDER`.
"""

import csv
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics import CatMetric, MaxMetric, MeanMetric, MetricCollection, SumMetric

from nmlightning import Digits, ImageClassifier, Int8Linear, QuantizationNoise
from nmlightning.callbacks import AtomicCheckpointIO, ExactResume, WeightNormSwap
from nmlightning.errors import InputError
from recorded_runs import StepsByHand, Trains, make_data
from scripts import run_python
from trainers import quiet_trainer
from translation_runs import make_net, make_text, make_translator

EPOCHS, BATCHES = 3, 4


class Noisy(nn.Module):
    """Draws from all generators, in validation too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 8), nn.Dropout(), QuantizationNoise(0.1),
            Int8Linear(8, 10, gradient_bits=2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        noise = random.gauss(0, 1) + float(np.random.randn())
        logits: Tensor = self.layers(x.mean(1)) * (1 + 0.01 * noise)
        return logits


class Logs(ImageClassifier):
    """Logs means of its own, too: of Lightning's, and of a metric that is no sum."""

    def __init__(self, net: nn.Module, **options: Any) -> None:
        super().__init__(net, **options)
        self.largest = MaxMetric()
        self.by_hand = MetricCollection([MeanMetric(), SumMetric(), MaxMetric(), CatMetric()])
        self.logged_by_hand: list[dict[str, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train/mean", loss, on_epoch=True, on_step=False)
        self.log("train/most", loss, on_epoch=True, on_step=False, reduce_fx="max")
        self.largest(loss)
        self.log("train/largest", self.largest, on_epoch=True, on_step=False)
        self.by_hand.update(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        logged = {k: v.sum().item() for k, v in self.by_hand.compute().items()}
        self.logged_by_hand.append(logged | {"updates": self.by_hand["MeanMetric"].update_count})
        self.by_hand.reset()


class Keep(pl.Callback):
    """Keeps a checkpoint of each step and of each epoch's end, and what was logged."""

    def __init__(self, folder: Path, last: int | None = None) -> None:
        self.folder, self.last = folder, last
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")
        trainer.should_stop = trainer.global_step == self.last  # as max_time does

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"epoch={trainer.current_epoch}.ckpt")
        values = {k: float(v) for k, v in trainer.callback_metrics.items()}
        self.logged.append(values)


def fit(
    folder: Path,
    start: Path | None = None,
    data: Any = None,
    lr: float = 0.1,
    seed: int = 1,
    last: int | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Return the weights at the end, and what each epoch logged."""
    pl.seed_everything(seed)
    task = Logs(
        Noisy(),
        optimizer=lambda groups: SGD(groups, lr=lr, momentum=0.9),
        lr_scheduler=lambda optimizer: StepLR(optimizer, 2),
    )
    keep = Keep(folder, last)
    options |= {"limit_train_batches": BATCHES, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    trainer = quiet_trainer(
        ExactResume(), keep, max_epochs=EPOCHS, plugins=[AtomicCheckpointIO()], **options
    )
    torch.manual_seed(seed + int(os.environ.get("LOCAL_RANK", 0)))  # other numbers on each rank
    given = {"datamodule": Digits(batch_size=32, image_size=8)} if data is None else data
    trainer.fit(task, **given, ckpt_path=start)
    logged = [x | y for x, y in zip(keep.logged, task.logged_by_hand, strict=True)]
    return {name: w.clone() for name, w in task.state_dict().items()}, logged


def assert_resumes(tmp_path: Path, name: str, data: Any = lambda: None, **options: Any) -> None:
    weights, logged = fit(tmp_path, data=data(), **options)
    (tmp_path / "again").mkdir(exist_ok=True)
    random.seed(7)
    found, again = fit(tmp_path / "again", tmp_path / name, data=data(), **options)
    assert logged[-len(again) :] == again
    assert 1 <= len(again) <= EPOCHS
    for key, weight in weights.items():
        assert torch.equal(found[key], weight), key


@pytest.mark.parametrize("name", ["step=2.ckpt", "step=5.ckpt", "step=8.ckpt", "epoch=0.ckpt"])
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_resume_is_exact(tmp_path: Path, name: str) -> None:
    assert_resumes(tmp_path, name)
    checkpoint = torch.load(tmp_path / name, weights_only=True)
    within = name in ("step=2.ckpt", "step=5.ckpt")
    assert checkpoint["nmlightning.ExactResume"]["within_epoch"] is within


@pytest.mark.parametrize("stop", [{"last": 6}, {"max_steps": 6}, {"last": 8}], ids=str)
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_resume_is_exact_where_a_fit_was_stopped(tmp_path: Path, stop: dict[str, int]) -> None:
    fit(tmp_path / "stopped", **stop)
    assert_resumes(tmp_path, "stopped/epoch=1.ckpt")


@pytest.mark.parametrize("step", [4, 7])
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_translator_resumes_its_means(tmp_path: Path, step: int) -> None:
    def run(folder: Path, start: Path | None = None) -> tuple[Any, Any]:
        pl.seed_everything(1)
        task = make_translator(make_net(dropout=0.3))
        options = {"max_steps": 11, "limit_val_batches": 0, "log_every_n_steps": 4}
        logger = CSVLogger(folder)
        swap = WeightNormSwap(layers=["linear", "embedding"])
        trainer = quiet_trainer(ExactResume(), swap, Keep(folder), **options | {"logger": logger})
        trainer.fit(task, make_text(tmp_path), ckpt_path=start)
        rows = csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines())
        logged = {row["step"]: (row["train/loss"], row["train/ppl"]) for row in rows}
        return [w.clone() for w in task.parameters()], logged

    weights, logged = run(tmp_path)
    found, again = run(tmp_path / "again", tmp_path / f"step={step}.ckpt")
    assert again == {at: means for at, means in logged.items() if int(at) >= step}
    assert all(map(torch.equal, weights, found))


@pytest.mark.slow
def test_resume_is_exact_on_two_ranks(tmp_path: Path) -> None:
    run_python(__file__, tmp_path)


@pytest.mark.parametrize("gives", ["loader", "module"])
def test_resume_shuffles_as_before_at_the_end_of_an_epoch(tmp_path: Path, gives: str) -> None:
    def data() -> dict[str, Any]:
        images = torch.randn(128, 1, 8, 8, generator=torch.Generator().manual_seed(2))
        rows = TensorDataset(images, torch.arange(128) % 10)
        loaders = DataLoader(rows, 32, shuffle=True), DataLoader(rows, 32)
        if gives == "module":
            module: Any = pl.LightningDataModule()
            module.train_dataloader = lambda: [loaders[0], random_split(rows, [64, 64])][0]
            module.val_dataloader = lambda: loaders[1]
            return {"datamodule": module}
        return {"train_dataloaders": loaders[0], "val_dataloaders": loaders[1]}

    assert_resumes(tmp_path, "epoch=1.ckpt", data)


@pytest.mark.parametrize(("make", "step"), [(Trains, 2), (StepsByHand, 4)])
def test_resume_within_an_epoch_says_that_other_batches_follow(
    make: Any, step: int, tmp_path: Path
) -> None:
    """Lightning does for a loader without state; but two optimizers have taken 4 of 4 steps."""
    quiet_trainer(ExactResume(), Keep(tmp_path)).fit(make(), make_data(4))
    with pytest.warns(UserWarning, match="your dataloader|the training loader has no") as caught:
        quiet_trainer(ExactResume()).fit(make(), make_data(4), ckpt_path=tmp_path / f"{step=}.ckpt")
    assert sum("checkpoint" in str(warning.message) for warning in caught) == 1


@pytest.mark.parametrize(
    ("change", "missing", "message"),
    [
        ({"lr": 0.2}, {}, "run has SGD lr 0.1, .* asks for SGD lr 0.2: give the same"),
        ({"seed": 2}, {}, "run has seed 1, and this one asks for seed 2"),
        ({}, {"optimizer_states": []}, "of 0 optimizers, and this run has 1: give one of the w"),
    ],
)
def test_resume_refuses_what_it_would_not_follow(
    tmp_path: Path, change: dict[str, Any], missing: dict[str, Any], message: str
) -> None:
    fit(tmp_path)
    content = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    torch.save(content | missing, tmp_path / "start.ckpt")
    with pytest.raises(InputError, match=message):
        fit(tmp_path, tmp_path / "start.ckpt", **change)


if __name__ == "__main__":
    assert_resumes(Path(sys.argv[1]), "step=6.ckpt", strategy="ddp", devices=2)
