"""ScaledStart: a fit that begins with larger weights."""

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn


class ScaledStart(Callback):
    """Multiplies the weights of all convolutions before a fit; a checkpoint is loaded after this.

    Args:
        factor: 100 by default, where the squares of what they give leave float16.
    """

    def __init__(self, factor: float = 100.0) -> None:
        self.factor = factor

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Scale once, whatever the norms are by now."""
        if stage != "fit":
            return
        for module in pl_module.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data.mul_(self.factor)
