#!/usr/bin/env bash
# pytorch-lightning 2.6.6: with a scheduler that computes rates from its base rates, the rate that
# LearningRateFinder found is gone after the scheduler's first step.
#
# Expected: LearningRateFinder finds a rate and training goes on with it; a warm-up or a decay by
#   LambdaLR scales the found rate.
# Seen: the attribute of the module and the groups of the optimizer get the found rate, the scheduler
#   keeps the base rate that the optimizer was made with. The first step of training has the found
#   rate, every one after it the old rate times the lambda. Nothing is said. Without a scheduler the
#   found rate stays.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'pytorch-lightning==2.6.6' 'torch==2.15.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import logging
import warnings

warnings.filterwarnings("ignore")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateFinder
from torch.utils.data import DataLoader, TensorDataset

OLD = 1e-3


class Regression(pl.LightningModule):
    def __init__(self, scheduled):
        super().__init__()
        self.lr, self.scheduled, self.rates = OLD, scheduled, []
        self.net = torch.nn.Linear(8, 1)

    def training_step(self, batch, _):
        x, y = batch
        return (self.net(x) - y).square().mean()

    def on_train_batch_start(self, *_):
        self.rates.append(self.optimizers().param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        if not self.scheduled:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


print("pytorch-lightning", pl.__version__)
x = torch.randn(1600, 8, generator=torch.Generator().manual_seed(0))
for scheduled in (False, True):
    pl.seed_everything(0, verbose=False)
    module = Regression(scheduled)
    finder = LearningRateFinder(min_lr=1e-4, num_training_steps=100, early_stop_threshold=None)
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[finder],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=16))
    found, rates = finder.optimal_lr.suggestion(), module.rates[-100:]
    name = "LambdaLR(step: 1.0)" if scheduled else "no scheduler"
    print(f"{name}: found {found:.4g}, trained with {rates[0]:.4g}, then {rates[1]:.4g}, {rates[-1]:.4g}")
    assert found != OLD and module.lr == found and rates[0] == found
    assert set(rates[1:]) == {OLD if scheduled else found}
PYTHON
venv/bin/python show.py
