"""Test that two ranks record and steer as one process does, under DDP and under FSDP2.

Run as a script it is one of the ranks: `python test_tracker_on_ranks.py FOLDER STRATEGY`.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Subset, TensorDataset

import optim_rules
from nmlightning.callbacks import WeightNormTracker
from nmlightning.norms.batch_norm import LpBatchNorm2d
from nmlightning.reports.run import read_run
from nmlightning.weights.history import NormHistory
from nmlightning.weights.recording_file import FILE_NAME
from trainers import quiet_trainer, run_as_script

EPOCHS = 3
RULES = ("none", *optim_rules.RULES)
pytestmark = pytest.mark.filterwarnings("ignore:LRCorrection.mode=.paper.. has no brake")


class Ranked(pl.LightningModule):
    """Sees the same eight images a step, on one rank or shared by two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            *(nn.Conv2d(2, 4, 3, bias=False), LpBatchNorm2d(4, p=2, sync=True), nn.ReLU()),
            *(nn.Conv2d(4, 6, 3, bias=False), LpBatchNorm2d(6, p=2, sync=True)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
        )

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for layer in (self.net[0], self.net[3]):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(16, 2, 8, 8, generator=generator)
        ranks = self.trainer.world_size
        mine = Subset(
            TensorDataset(images, torch.arange(16) % 3), range(self.trainer.global_rank, 16, ranks)
        )
        return DataLoader(mine, batch_size=8 // ranks)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.net(batch[0])  # FSDP2's root keeps its weights gathered after it

    val_dataloader = train_dataloader

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, foreach=False)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def train(folder: Path, strategy: Any, rule: str, devices: int) -> None:
    steering = None if rule == "none" else optim_rules.RULES[rule](folder / "reference")
    tracker = WeightNormTracker(every=1, steering=steering, other_run=True)
    trainer = quiet_trainer(
        tracker,
        strategy=strategy,
        devices=devices,
        max_epochs=EPOCHS,
        default_root_dir=folder / rule,
        logger=TensorBoardLogger(folder / rule, "", ""),
        log_every_n_steps=1,
        use_distributed_sampler=False,
    )
    trainer.fit(Ranked())


def write_reference(folder: Path) -> None:
    """Record a run, and shrink its norms to a third, channel by channel."""
    train(folder, "auto", "none", 1)
    recorded = NormHistory.load(folder / "none")
    shrink = np.linspace(1, 0.3, len(recorded))[:, None]
    norms = {
        name: values * shrink * np.linspace(1, 0.8, values.shape[1])
        for name, values in recorded.norms.items()
    }
    history = NormHistory.from_arrays(norms, recorded.steps, recorded.epochs)
    history.save(folder / "reference" / FILE_NAME)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    write_reference(folder)
    return folder


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def two_ranks(
    request: pytest.FixtureRequest, one_process: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of the runs by all rules, which one start of two processes trains."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    shutil.copytree(one_process / "reference", folder / "reference")
    run_as_script(__file__, folder, request.param)
    return folder


@pytest.fixture(params=RULES)
def folders(
    request: pytest.FixtureRequest, two_ranks: Path, one_process: Path
) -> tuple[Path, Path]:
    """Those of a rule's runs, in one process and on two ranks."""
    if not (one_process / request.param).exists():
        train(one_process, "auto", request.param, 1)
    return one_process / request.param, two_ranks / request.param


def test_tracker_on_two_ranks_records_as_one_process(folders: tuple[Path, Path]) -> None:
    one, two = map(NormHistory.load, folders)
    assert two.provenance["world_size"] == 2
    assert two.steps.tolist() == one.steps.tolist() == list(range(2 * EPOCHS + 1))
    np.testing.assert_array_equal(two.learning_rates, one.learning_rates)
    for name, values in one.norms.items():
        # Sums over two ranks round differently from one sum, in float32, over six steps.
        np.testing.assert_allclose(two.norms[name], values, rtol=1e-4, err_msg=name)


def test_tracker_on_two_ranks_logs_as_one_process(folders: tuple[Path, Path]) -> None:
    one, two = (read_run(folder).scalars for folder in folders)
    assert list(two) == list(one)
    assert any(tag.startswith("correction_factor") for tag in one) == (folders[0].name != "none")
    for tag, series in one.items():
        assert two[tag].steps.tolist() == series.steps.tolist()
        np.testing.assert_allclose(two[tag].values, series.values, rtol=1e-3, err_msg=tag)


def train_by_all_rules(folder: Path, kind: str) -> None:
    for rule in RULES:
        strategy: Any = "ddp"
        if kind == "fsdp2":
            strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        train(folder, strategy, rule, 2)


if __name__ == "__main__":
    train_by_all_rules(Path(sys.argv[1]), sys.argv[2])
