"""A Lightning project of your own: L1 norms, recorded weight norms, a rule that replays them.

Output, where the second run takes the steps that weight decay would have given it:

    decay on:          90.3 % of the other digits are right, norms × 0.41
    off, LR corrected: 92.8 % of the other digits are right, norms × 1.00
"""

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from timm.optim import param_groups_weight_decay
from torch.nn.functional import cross_entropy

from nmlightning import LRCorrection, NormHistory, NormSwap, WeightNormTracker, exempt_from_decay
from nmlightning.datamodules import Digits
from nmlightning.models import CifarResNet


class Project(pl.LightningModule):
    def __init__(self, rule: LRCorrection | None) -> None:
        super().__init__()
        self.net = CifarResNet(depth=8)
        self.rule = rule

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        right = self.net(batch[0]).argmax(1) == batch[1]
        self.log("right", right.float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = param_groups_weight_decay(self, weight_decay=0.05)  # no norms and biases
        if self.rule:  # nor what it steers
            groups = exempt_from_decay(groups, self, self.rule)
        return torch.optim.SGD(groups, lr=0.02, momentum=0.9)


def run(name: str, rule: LRCorrection | None) -> None:
    pl.seed_everything(1, verbose=False)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=CSVLogger("runs", name),
        callbacks=[NormSwap("l1"), WeightNormTracker(steering=rule)],
        enable_progress_bar=False,
    )
    trainer.fit(Project(rule), Digits(image_size=8, batch_size=32))
    norms = NormHistory.load(trainer.log_dir).norms["net.conv1.weight"]
    right = float(trainer.callback_metrics["right"])
    change = float((norms[-1] / norms[0]).mean())
    print(
        f"{name + ':':<18} {100 * right:.1f} % of the other digits are right, norms × {change:.2f}"
    )


run("decay on", None)
run("off, LR corrected", LRCorrection("runs/decay on"))
