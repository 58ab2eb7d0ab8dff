"""CIFAR as most programs read it: a PIL image at a time, through torchvision's transforms."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from nmlightning.datamodules.cifar10 import AUGMENTATION, MEAN, STD


class Pictures(Dataset[tuple[Tensor, int]]):
    """Pixels (N, H, W, C) uint8 in memory, decoded and augmented one by one."""

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
