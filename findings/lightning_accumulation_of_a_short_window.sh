#!/usr/bin/env bash
# pytorch-lightning 2.6.6: with accumulate_grad_batches the last, shorter window of an epoch makes a
# gradient that is too small.
#
# Expected: each optimizer step takes the mean gradient of the batches it has seen.
# Seen: every loss is divided by accumulate_grad_batches. Ten batches in windows of four end in one of
#   two batches, whose sum is still divided by four: half of the mean. With accumulate_grad_batches
#   greater than an epoch's batches every step is scaled so: 10 batches of 40 give a quarter.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'pytorch-lightning==2.6.6' 'torch==2.15.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import logging

logging.disable(logging.WARNING)
import warnings

warnings.filterwarnings("ignore")
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


class Slope(pl.LightningModule):
    """Its loss has a gradient of 1 for every batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.gradients = []

    def training_step(self, batch, _):
        return self.weight.sum() * batch[0].mean()

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(round(self.weight.grad.item(), 4))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


print("pytorch-lightning", pl.__version__)
for window, expected in ((1, [1.0] * 10), (4, [1.0, 1.0, 0.5]), (40, [0.25])):
    module = Slope()
    trainer = pl.Trainer(
        max_epochs=1,
        accumulate_grad_batches=window,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.ones(10, 1)), batch_size=1))
    print(f"10 batches, accumulate_grad_batches={window}: gradients {module.gradients}")
    assert module.gradients == expected
PYTHON
venv/bin/python show.py
