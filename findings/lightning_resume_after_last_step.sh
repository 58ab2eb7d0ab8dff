#!/usr/bin/env bash
# pytorch-lightning 2.6.6: a checkpoint that every_n_train_steps takes after the last step of an epoch
# resumes past that epoch's validation.
#
# Expected: a resumed run does what the run that was not stopped does after the same step: validation,
#   then the hooks of the epoch's end, whatever step the checkpoint is of.
# Seen: epochs of four steps. Resumed from step 3, both come as without a stop. Resumed from step 4,
#   the next epoch begins at once: the validation of epoch 0 and on_train_epoch_end never come, so that
#   EarlyStopping, ReduceLROnPlateau and ModelCheckpoint(monitor=...) have no value of that epoch.
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
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset


class Notes(pl.LightningModule):
    """Writes down which validations and epoch ends come."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, _):
        return (self.weight * batch[0].mean()).sum()

    def validation_step(self, batch, _):
        pass

    def on_validation_start(self):
        self.seen.append(f"validation at step {self.global_step}")

    def on_train_epoch_end(self):
        self.seen.append(f"end of epoch {self.current_epoch}")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(resumed=None):
    module, loader = Notes(), DataLoader(TensorDataset(torch.ones(4, 1)), batch_size=1)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        callbacks=ModelCheckpoint(
            f"from_{resumed}", "{step}", every_n_train_steps=1, save_top_k=-1
        ),
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, loader, ckpt_path=resumed and f"from_None/step={resumed}.ckpt")
    print("not stopped:" if resumed is None else f"resumed from step {resumed}:", module.seen)
    return module.seen


print("pytorch-lightning", pl.__version__)
whole = fit()
assert fit(3) == whole and len(whole) == 4
assert fit(4) == whole[2:]
PYTHON
venv/bin/python show.py
