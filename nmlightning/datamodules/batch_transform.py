"""Pad-crop, mirror and normalise a whole batch at once, on the device that trains."""

import torch
from torch import Tensor
from torch.nn import functional as F

from nmlightning.datamodules.batches import RawBatch


class BatchTransform:
    """Turns a `RawBatch` into `(x, y)`: x = (crop(images) / 255 − mean) / std, (N, C, H, W).

    Args:
        mean: a value per channel, of images scaled to 0 … 1.
        std: likewise.
        pad: pixels of zeros around an image before it is cropped.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], pad: int) -> None:
        self.mean = mean
        self.std = std
        self.pad = pad
        self._constants: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(
        self, batch: RawBatch, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        images = batch.images
        if batch.corners is not None:
            images = crop(images, batch.corners, self.pad)
        if batch.flips is not None:
            images = mirror(images, batch.flips)
        scale, shift = self._scale_and_shift(images.device, dtype)
        # In three operations, since one of uint8 with a float takes twice as long on a CPU.
        return images.to(dtype).mul_(scale).add_(shift), batch.labels

    def _scale_and_shift(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return 1 / (255·std) and −mean / std as (1, C, 1, 1), copied to each device once."""
        if (device, dtype) not in self._constants:
            mean, std = (
                torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)
                for values in (self.mean, self.std)
            )
            scale, shift = 1 / (255 * std), -mean / std
            self._constants[device, dtype] = scale.to(device, dtype), shift.to(device, dtype)
        return self._constants[device, dtype]


def crop(images: Tensor, corners: Tensor, pad: int) -> Tensor:
    """Return each image (N, C, H, W) padded with zeros and cut back to H×W.

    `corners` (N, 2) are the rows and columns, 0 … 2·pad, of the top left pixels; pad is the middle.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (pad, pad, pad, pad))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view (N, C, 2p+1, 2p+1, H, W)
    every = torch.arange(len(images), device=images.device)
    return windows[every, :, corners[:, 0], corners[:, 1]]


def mirror(images: Tensor, flips: Tensor) -> Tensor:
    """Return the images (N, C, H, W) mirrored left to right where `flips` (N,) is True."""
    both = torch.cat([images, images.flip(-1)])  # picking rows is 4 times as fast as torch.where
    every = torch.arange(len(images), device=images.device)
    return both.index_select(0, every + len(images) * flips)
