"""Weights & Biases: what a WeightNormTracker logs there, kept in a folder without an account.

Output:

    effective_lr/all           0.074
    rotation/all               0.014
    rotation_equilibrium/all   0.010
    weight_norm/all/max        1.559
    weight_norm/all/mean       1.143
    weight_norm/all/min        0.517
    to upload: wandb sync wandb/offline-run-*
"""

import os

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import WandbLogger

from nmlightning import ImageClassifier, NormSwap, WeightNormTracker
from nmlightning.datamodules import Digits
from nmlightning.models import CifarResNet

os.environ["WANDB_MODE"] = "offline"  # leave it out to log to your account
os.environ["WANDB_SILENT"] = "true"

pl.seed_everything(1, verbose=False)
net = CifarResNet(depth=8)
module = ImageClassifier(net, lambda groups: torch.optim.SGD(groups, 0.1, weight_decay=5e-4))
logger = WandbLogger(project="norms", name="digits by L1", save_dir=".")
trainer = pl.Trainer(
    max_epochs=1,
    accelerator="cpu",
    logger=logger,
    callbacks=[NormSwap("l1"), WeightNormTracker()],
    log_every_n_steps=10,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, Digits(image_size=8, batch_size=32))
for key, value in sorted(dict(logger.experiment.summary).items()):
    if key.endswith("/all") or key.startswith("weight_norm"):  # over all layers
        print(f"{key:<26} {value:.3f}")
print("to upload: wandb sync wandb/offline-run-*")
