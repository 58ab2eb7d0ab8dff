"""LightningModules that have never heard of this package, for both Lightning packages."""

from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from trainers import QUIET


def small_net() -> nn.Sequential:
    conv = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
    return nn.Sequential(*conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


class Trains:
    """The module of a user, for either package; images (N, 2, H, W) are of three classes."""

    net: Any

    def __init__(self) -> None:
        super().__init__()
        self.build()

    def build(self) -> None:
        self.net = small_net()

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Classifies(Trains):
    """Is validated and tested, too."""

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    test_step = validation_step


class BuildsLate(Classifies):
    """Has no net before `configure_model`."""

    def build(self) -> None:
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            super().build()


class PlModule(Classifies, pytorch_lightning.LightningModule):
    pass


class UnifiedModule(Classifies, lightning.pytorch.LightningModule):
    pass


class PlLate(BuildsLate, pytorch_lightning.LightningModule):
    pass


class UnifiedLate(BuildsLate, lightning.pytorch.LightningModule):
    pass


BOTH = pytest.mark.parametrize("module_class", [PlModule, UnifiedModule])
ALL = pytest.mark.parametrize("module_class", [PlModule, UnifiedModule, PlLate, UnifiedLate])


class OwnOptimizer(PlModule):
    """Made its optimizer before any hook, as LightningCLI's automatic optimizers are."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer


def package_of(module_class: type) -> Any:
    """Return the Lightning package that `module_class` is made with."""
    unified = issubclass(module_class, lightning.pytorch.LightningModule)
    return lightning.pytorch if unified else pytorch_lightning


def make(module_class: type) -> Any:
    torch.manual_seed(1)
    return module_class()


def make_trainer(module_class: type, *callbacks: Any, **options: Any) -> Any:
    """Return a quiet Trainer for one epoch, of the package that `module_class` is made with."""
    settings = {"callbacks": list(callbacks), "devices": 1, "max_epochs": 1, **QUIET, **options}
    return package_of(module_class).Trainer(**settings)


def norm_types(module: nn.Module) -> list[type]:
    return [type(m) for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def make_data(batches: int = 4, seed: int = 3) -> DataLoader[Any]:
    """Return batches of four images."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(4 * batches, 2, 8, 8, generator=draw)
    return DataLoader(TensorDataset(images, torch.arange(4 * batches) % 3), batch_size=4)


def fit(module: Any, *callbacks: Any, ckpt_path: Any = None, **options: Any) -> Any:
    """Train `module` on four batches an epoch, with validation, and return its Trainer."""
    trainer = make_trainer(type(module), *callbacks, **options)
    trainer.fit(module, make_data(), make_data(), ckpt_path=ckpt_path)
    return trainer
