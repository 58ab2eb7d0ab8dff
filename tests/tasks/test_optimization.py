"""A learning rate that grows with the batch, where asked, or that Lightning's finder finds."""

import logging
from ast import literal_eval
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateFinder
from pytorch_lightning.tuner import Tuner
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR, StepLR
from torch.utils.data import DataLoader

from nmlightning import optim
from nmlightning.callbacks import NormSwap, WeightNormTracker
from nmlightning.datamodules import Digits
from nmlightning.errors import InputError
from nmlightning.tasks import ImageClassifier
from trainers import quiet_trainer
from translation_runs import make_text, make_translator


def sgd(groups: Any) -> torch.optim.Optimizer:
    """A rate of 0.1, and of 0.3 for what does not decay."""
    for group, lr in zip(groups, (0.1, 0.3), strict=False):
        group["lr"] = lr
    return torch.optim.SGD(groups, lr=1.0, weight_decay=1e-4)


def make_task(lr_batch_size: Any = None) -> ImageClassifier:
    return ImageClassifier(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
        optimizer=sgd,
        lr_scheduler=lambda optimizer: MultiStepLR(optimizer, [1]),
        weight_decay_scope="no_norm",
        lr_batch_size=lr_batch_size,
    )


class Rates(pl.Callback):
    """Keeps the learning rates of each epoch, in the process that started the others, too."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: object) -> None:
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        with self.file.open("a") as lines:
            lines.write(f"{rates}\n")

    def read(self) -> list[Any]:
        return [literal_eval(line) for line in self.file.read_text().splitlines()]


def fit(tmp_path: Path, lr_batch_size: Any, **options: Any) -> tuple[list[Any], pl.Trainer]:
    rates = Rates(tmp_path / "rates")
    ckpt_path = options.pop("ckpt_path", None)
    data = Digits(options.pop("batch_size", 64), image_size=8, channels=1)
    settings = {"max_epochs": 2, "limit_train_batches": 2, "limit_val_batches": 1, **options}
    trainer = quiet_trainer(rates, **settings)
    trainer.fit(make_task(lr_batch_size), data, ckpt_path=ckpt_path)
    return rates.read(), trainer


@pytest.mark.parametrize(
    ("lr_batch_size", "accumulate", "factor"),
    [(None, 1, 1), (None, 2, 1), (64, 1, 1), (256, 1, 1 / 4), (256, 2, 1 / 2), (16, 2, 8)],
)
def test_lr_batch_size_scales_every_group_before_the_scheduler(
    tmp_path: Path, caplog: Any, lr_batch_size: Any, accumulate: int, factor: float
) -> None:
    with caplog.at_level(logging.INFO):
        rates, trainer = fit(tmp_path, lr_batch_size, accumulate_grad_batches=accumulate)
    expected = [[0.1 * factor, 0.3 * factor], [0.01 * factor, 0.03 * factor]]
    for first, second in zip(rates, expected, strict=True):
        assert first == pytest.approx(second)
    groups = trainer.optimizers[0].param_groups
    assert [group["initial_lr"] for group in groups] == pytest.approx(expected[0])
    said = [text for text in caplog.messages if text.startswith("ImageClassifier: learning rate")]
    assert len(said) == (factor != 1)
    if factor == 1 / 2:
        assert "learning rate 0.1, 0.3 × 128/256 = 0.05, 0.15, for 128 images a step" in said[0]


@pytest.mark.usefixtures("_forks")
def test_lr_batch_size_counts_processes(tmp_path: Path) -> None:
    rates, _ = fit(tmp_path, 256, strategy="ddp_fork", devices=2, max_epochs=1)
    assert rates == [pytest.approx([0.05, 0.15])] * 2


@pytest.mark.parametrize(("batch_size", "factor"), [(1437, 1437 / 256), (5000, 1437 / 256)])
def test_lr_batch_size_counts_a_small_set(tmp_path: Path, batch_size: int, factor: float) -> None:
    """Of the digits 1,437 train."""
    rates, trainer = fit(tmp_path, 256, batch_size=batch_size, max_epochs=1)
    assert trainer.num_training_batches == 1
    assert rates == [pytest.approx([0.1 * factor, 0.3 * factor])]
    assert Digits(batch_size).images_a_batch(2) == batch_size, "before it is set up"


def test_lr_batch_size_refuses_a_resume_with_another_batch(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    _, trainer = fit(tmp_path, 256, max_epochs=1)
    trainer.save_checkpoint(path)
    message = "has learning rates for 64 images a step, and this run has 128: choose data.batch_s"
    with pytest.raises(InputError, match=message):
        fit(tmp_path, 256, accumulate_grad_batches=2, ckpt_path=path)
    trainer.test(make_task(256), Digits(32, image_size=8, channels=1), path, verbose=False)
    fit(tmp_path, 256, ckpt_path=path)
    rates, _ = fit(tmp_path, None, accumulate_grad_batches=2, ckpt_path=path)
    assert rates[-1] == pytest.approx([0.0025, 0.0075]), "the checkpoint's, at the milestone"


def test_lr_batch_size_refuses_bad_settings() -> None:
    with pytest.raises(InputError, match="lr_batch_size must be a whole number of at least 1, got"):
        make_task(0)
    message = "lr_batch_size scales .* not known: fit with a data module that has a batch_size"
    with pytest.raises(InputError, match=message):
        make_task(256).configure_optimizers()
    loader = DataLoader([(torch.zeros(64), torch.tensor(0))], batch_size=1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        quiet_trainer().fit(make_task(256), loader, loader)


pytestmark = pytest.mark.filterwarnings("ignore:The .* does not have many workers")


def make_either_task(name: str, folder: Path) -> tuple[pl.LightningModule, pl.LightningDataModule]:
    if name == "Translator":
        schedule: Any = lambda optimizer: optim.InverseSquareRootLR(optimizer, 10)  # noqa: E731
        return make_translator(lr_scheduler=schedule), make_text(folder)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
    data = Digits(batch_size=64, image_size=8)
    options: Any = {"lr_scheduler": lambda o: StepLR(o, 5), "lr_batch_size": 32}
    return ImageClassifier(net, lambda groups: SGD(groups, lr=1e-9), **options), data


@pytest.mark.parametrize("name", ["ImageClassifier", "Translator"])
@pytest.mark.parametrize("by", ["callback", "tuner"])
def test_rate_is_found_and_set(name: str, by: str, tmp_path: Path) -> None:
    task, data = make_either_task(name, tmp_path)
    others = [NormSwap("l1", kinds=["layer" if name == "Translator" else "batch"])]
    others += [WeightNormTracker()]
    finder = [LearningRateFinder(num_training_steps=15)] if by == "callback" else []
    options = {"limit_val_batches": 1, "default_root_dir": tmp_path}
    trainer = quiet_trainer(*finder, *others, **options)
    if by == "tuner":
        found = Tuner(trainer).lr_find(task, data, num_training=15)
        assert task.lr == found.suggestion()
    trainer.fit(task, data)
    assert 1e-8 < task.lr <= 1
    (optimizer,), (config,) = trainer.optimizers, trainer.lr_scheduler_configs
    assert config.scheduler.base_lrs == [task.lr] * len(optimizer.param_groups)
    assert [group["lr"] for group in optimizer.param_groups] == config.scheduler.get_last_lr()
