"""C9: the images of an epoch on the CPU, against torchvision's pipeline."""

import torch
from sampled import sample_rounds
from speed_plan import Plan
from targets import Bound, Measurement
from torchvision_pipeline import torchvision_loader

from nmlightning import CIFAR10
from nmlightning.datamodules.image_data import LabelledImages


def measure_data(plan: Plan) -> Measurement:
    """Return C9's row of reading an epoch."""
    data = RandomCIFAR(plan.images, plan.batch)
    assert isinstance(data.train, LabelledImages)
    loader = torchvision_loader(data.train.images, data.train.labels, plan.batch)
    reads = {"ours": lambda: _read(data), "torchvision": lambda: [None for _ in loader]}
    figure = sample_rounds(reads, plan.net_pace).figure("ours", to="torchvision")
    case = f"{plan.images} of 3×32×32, batch {plan.batch}, no workers"
    return Measurement("C9", "data an image / torchvision's pipeline", case, "", figure, Bound(0.1))


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
