"""Converts a trained L2 network to another norm, and measures what that costs.

    python results/convert.py NORM RUNS --seed_everything SEED

RUNS is the folder of the fits of `cifar_l2` (`runs/cifar_l2`). metrics.csv has three steps: as it
was swapped (0), with running statistics of 50 batches instead (50), and after an epoch of training
(the last), at a hundredth of the first rate of the L2 run.
"""

import argparse
import itertools
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.loggers import CSVLogger
from torch.optim.swa_utils import update_bn

from nmlightning import CIFAR10, ImageClassifier, load_from_checkpoint, swap_norms
from nmlightning.commands.files import last_checkpoint
from nmlightning.models import CifarResNet

BATCHES = 50
sgd = partial(torch.optim.SGD, lr=1e-3, momentum=0.9, weight_decay=1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("norm")
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seed_everything", type=int, required=True)
    options = parser.parse_args()
    seed_everything(options.seed_everything)
    checkpoint = last_checkpoint(options.runs)
    assert checkpoint is not None, f"there is no checkpoint in {options.runs}"
    task = load_from_checkpoint(
        ImageClassifier, checkpoint, net=CifarResNet(20), optimizer=sgd, channels_last=True
    )
    print(swap_norms(task.net, options.norm))
    logger = CSVLogger("runs", name=f"to_{options.norm}", version=0)
    measure(task, logger, 0)
    recalibrate(task)
    measure(task, logger, BATCHES)
    make_trainer(logger).fit(task, datamodule=CIFAR10("data"))


def make_trainer(logger: CSVLogger | Literal[False]) -> Trainer:
    return Trainer(
        logger=logger,
        max_epochs=1,
        precision="bf16-mixed",
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def measure(task: ImageClassifier, logger: CSVLogger, step: int) -> None:
    """Log the accuracy of the test images."""
    (metrics,) = make_trainer(False).validate(task, datamodule=CIFAR10("data"))
    logger.log_metrics({**metrics, "epoch": -1}, step)  # before the first, which is 0
    logger.save()


def recalibrate(task: ImageClassifier) -> None:
    """Replace the running statistics by the means of those of some training batches."""
    data = CIFAR10("data")
    data.setup("fit")
    batches = itertools.islice(data.train_dataloader(), BATCHES)
    images = (data.on_after_batch_transfer(batch, 0)[0] for batch in batches)
    with torch.autocast("cpu", torch.bfloat16):
        update_bn(images, task)


if __name__ == "__main__":
    main()
