"""Training as a tutorial does it with Lightning: what `nm fit` is measured against.

python benchmarks/plain_training.py    # digits, ended by the first step
"""

import os
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Tutorial(pl.LightningModule):
    """Cross-entropy, logged each step."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9)


class EndAtFirstStep(pl.Callback):
    """Ends the process, without what else happens at its end."""

    def on_train_batch_end(self, *_: Any) -> None:
        os._exit(0)


def main() -> None:
    """Train torchvision's ResNet-18 on scikit-learn's digits, by a Trainer's defaults."""
    from sklearn.datasets import load_digits
    from torch.utils.data import DataLoader, TensorDataset
    from torchvision.models import resnet18

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None].repeat(1, 3, 2, 2) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    loader = DataLoader(data, batch_size=64, shuffle=True)
    pl.Trainer(callbacks=[EndAtFirstStep()]).fit(Tutorial(resnet18(num_classes=10)), loader)


if __name__ == "__main__":
    main()
