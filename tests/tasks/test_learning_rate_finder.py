"""Test that Lightning's LearningRateFinder finds a rate for both tasks, and sets it."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import LearningRateFinder
from pytorch_lightning.tuner import Tuner
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from nmlightning import optim
from nmlightning.callbacks import NormSwap, WeightNormTracker
from nmlightning.datamodules import Digits
from nmlightning.tasks import ImageClassifier
from trainers import quiet_trainer
from translation_runs import make_text, make_translator

pytestmark = pytest.mark.filterwarnings("ignore:The .* does not have many workers")


def make_task(name: str, folder: Path) -> tuple[pl.LightningModule, pl.LightningDataModule]:
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
    task, data = make_task(name, tmp_path)
    others = [NormSwap("l1", kinds=["layer" if name == "Translator" else "batch"])]
    others += [WeightNormTracker()]
    finder = [LearningRateFinder(num_training_steps=15)] if by == "callback" else []
    options = {"limit_val_batches": 1, "default_root_dir": tmp_path}
    trainer = quiet_trainer(*finder, *others, **options)
    if by == "tuner":
        found = Tuner(trainer).lr_find(task, data, num_training=15)
        assert found is not None
        assert task.lr == found.suggestion()
    trainer.fit(task, data)
    assert 1e-8 < task.lr <= 1
    (optimizer,), (config,) = trainer.optimizers, trainer.lr_scheduler_configs
    assert config.scheduler.base_lrs == [task.lr] * len(optimizer.param_groups)
    assert [group["lr"] for group in optimizer.param_groups] == config.scheduler.get_last_lr()
