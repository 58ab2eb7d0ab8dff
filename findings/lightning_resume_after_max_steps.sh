#!/usr/bin/env bash
# pytorch-lightning 2.6.6: a resume after max_steps or max_time skips the rest of the epoch they cut.
#
# Expected: a fit that max_steps ends within an epoch, saved and resumed with a larger limit, takes the
#   epoch's other batches first, as it does from a checkpoint that ModelCheckpoint wrote at that step:
#   two epochs of 4 batches end at step 8, and a schedule by epochs steps twice.
# Seen: the cut epoch counts as a whole one. From a checkpoint that is saved when the fit has ended the
#   resume begins the next epoch: 2 of 8 batches are never seen, and it ends at step 6. From a
#   checkpoint of ModelCheckpoint(every_n_train_steps=2), written at the same step, it ends at step 8.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'torch==2.15.0' 'pytorch-lightning==2.6.6' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import logging
import warnings

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
warnings.simplefilter("ignore")


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, index):
        self.seen.append((self.current_epoch, index))
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, path=None, callbacks=(), **limits):
    trainer = pl.Trainer(
        **limits, callbacks=[*callbacks], accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=bool(callbacks),
    )
    trainer.fit(module, DataLoader(torch.ones(4, 1)), ckpt_path=path)
    return trainer


print("pytorch-lightning", pl.__version__)
within = ModelCheckpoint(dirpath=".", filename="within", every_n_train_steps=2)
fit(Module(), max_steps=2, max_epochs=-1, callbacks=[within]).save_checkpoint("ended.ckpt")
for name, expected in (("within", 8), ("ended", 6)):
    module = Module()
    steps = fit(module, f"{name}.ckpt", max_epochs=2).global_step
    print(f"{name}.ckpt of step 2: resumes with (epoch, batch) {module.seen[0]}, ends at step {steps}")
    assert steps == expected
PYTHON
venv/bin/python show.py
