"""Test that two ranks normalise weights as one process does, under DDP and under FSDP2.

Run as a script it is one of the ranks: `python test_weight_norm_on_ranks.py FOLDER STRATEGY`.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Subset, TensorDataset

from nmlightning.callbacks import WeightNormSwap, WeightNormTracker
from nmlightning.weights.history import NormHistory
from trainers import quiet_trainer, run_as_script

FORMS: dict[str, dict[str, Any]] = {
    "bounded": {},
    "projected": {"p": 1, "project": True},
    "weight": {"kind": "weight", "include": ["net.0.weight", "net.2.weight", "net.6.weight"]},
    "gains": {"gain": "channel", "p": "inf"},
}


class Ranked(pl.LightningModule):
    """Sees the same eight images a step, on one rank or shared by two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        convs = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3)]
        self.net = nn.Sequential(*convs, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.net.append(nn.Linear(6, 3))

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for layer in (self.net[0], self.net[2]):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        images = torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(0))
        data = TensorDataset(images, torch.arange(16) % 3)
        ranks = self.trainer.world_size
        mine = Subset(data, range(self.trainer.global_rank, 16, ranks))
        return DataLoader(mine, batch_size=8 // ranks)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, foreach=False)


def train(folder: Path, strategy: Any, form: str, devices: int) -> None:
    """Train for two epochs, or resume with the second from a checkpoint of the first."""
    for epochs in (1, 2):
        last = folder / form / "last.ckpt"
        trainer = quiet_trainer(
            *(WeightNormSwap(**FORMS[form]), WeightNormTracker()),
            strategy=strategy(),
            devices=devices,
            max_epochs=epochs,
            default_root_dir=folder / form,
            use_distributed_sampler=False,
        )
        trainer.fit(Ranked(), ckpt_path=last if epochs == 2 else None)
        trainer.save_checkpoint(last)


def make_fsdp2() -> ModelParallelStrategy:
    return ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
    )


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    for form in FORMS:
        train(folder, lambda: "auto", form, 1)
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_weight_norm_on_two_ranks_trains_as_one_process(
    kind: str, one_process: Path, tmp_path: Path
) -> None:
    run_as_script(__file__, tmp_path, kind)
    for form in FORMS:
        one, two = (
            torch.load(folder / form / "last.ckpt")["state_dict"]
            for folder in (one_process, tmp_path)
        )
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=f"{form} {name}")
        records = [NormHistory.load(folder / form).norms for folder in (one_process, tmp_path)]
        assert "net.0.weight_v" in records[0]
        for name, norms in records[0].items():
            torch.testing.assert_close(
                torch.tensor(records[1][name]), torch.tensor(norms), rtol=1e-4, atol=1e-6
            )


if __name__ == "__main__":
    for each in FORMS:
        train(Path(sys.argv[1]), make_fsdp2 if sys.argv[2] == "fsdp2" else lambda: "ddp", each, 2)
