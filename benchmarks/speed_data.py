"""C9: the images of an epoch on the CPU, and an epoch of training by a Trainer, both as ratios."""

from collections.abc import Iterator, Set

import torch
from epoch_by_trainer import time_epochs
from interleaved import quartiles_of_ratio, time_rounds
from speed_plan import Plan
from targets import Bound, Measurement, Result
from torchvision_pipeline import torchvision_loader
from training_step import NETS

from nmlightning import CIFAR10
from nmlightning.datamodules.image_data import LabelledImages

STEPS = 4  # of an epoch of training


def measure_data(plan: Plan, targets: Set[str]) -> Iterator[Result]:
    """Yield C9: reading an epoch against torchvision's pipeline, and training against a loop."""
    data = RandomCIFAR(plan.images, plan.batch)
    assert isinstance(data.train, LabelledImages)
    loader = torchvision_loader(data.train.images, data.train.labels, plan.batch)
    reads = {"ours": lambda: _read(data), "torchvision": lambda: [None for _ in loader]}
    times = time_rounds(reads, plan.net_rounds, warm_up=1)
    yield Measurement(
        "C9",
        "data an image / torchvision's pipeline",
        f"{plan.images} of 3×32×32, batch {plan.batch}, no workers",
        "",
        quartiles_of_ratio(times, "ours", to="torchvision"),
        Bound(0.1),
    )
    few = RandomCIFAR(STEPS * plan.batch, plan.batch)
    times = time_epochs(NETS[plan.net][0](), few, plan.net_rounds)
    yield Measurement(
        "C9",
        "epoch by Trainer.fit / bare loop",
        f"{plan.net} with BN, {STEPS} steps, batch {plan.batch}",
        "",
        quartiles_of_ratio(times, "trainer", to="loop"),
        Bound(1.1),
    )


class RandomCIFAR(CIFAR10):
    """CIFAR10's data module with random images in place of its files."""

    def __init__(self, length: int, batch_size: int) -> None:
        super().__init__(batch_size=batch_size, download=False)
        images = torch.randint(256, (length, *self.image_shape), dtype=torch.uint8)
        self.train = LabelledImages(images, torch.randint(self.num_classes, (length,)))
        self.validation = self.train

    def prepare_data(self) -> None:
        """Look for no files."""

    def setup(self, stage: str | None = None) -> None:
        """Load nothing."""


def _read(data: CIFAR10) -> None:
    for batch in data.train_dataloader():
        data.on_after_batch_transfer(batch, 0)
