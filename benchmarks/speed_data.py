"""C9: the images of an epoch on the CPU, against torchvision's pipeline."""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sampled import sample_rounds
from speed_plan import Plan
from targets import Bound, Measurement
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from nmlightning import CIFAR10
from nmlightning.datamodules.cifar10 import AUGMENTATION, MEAN, STD
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


class Pictures(Dataset[tuple[Tensor, int]]):
    """Pixels (N, H, W, C) uint8 in memory, read as most programs do: a PIL image at a time."""

    def __init__(self, pixels: NDArray[np.uint8], labels: list[int]) -> None:
        self.pixels = pixels
        self.labels = labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(pixels.shape[1], padding=AUGMENTATION.pad),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[row])), self.labels[row]


def torchvision_loader(
    images: Tensor, labels: Tensor, batch_size: int, num_workers: int = 0
) -> DataLoader[tuple[Tensor, int]]:
    """Return a shuffling loader of images (N, C, H, W) uint8."""
    return DataLoader(
        Pictures(images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        pin_memory=num_workers > 0,
        persistent_workers=num_workers > 0,
    )
