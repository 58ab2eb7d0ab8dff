"""The base of the data modules of images: loaders, and batches transformed on the device.

The host only picks rows; `BatchTransform` does the arithmetic on the training device. For
`ResidentImages`, which lie there, the random numbers of an epoch are all that is copied, at once.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from nmlightning.datamodules.batches import (
    NO_AUGMENTATION,
    Augmentation,
    AugmentedShuffle,
    Draw,
    EvaluationBatches,
    ImageSource,
    RawBatch,
    images_a_batch,
)
from nmlightning.datamodules.training_batches import ResumableData, TrainingBatches, shard_of
from nmlightning.errors import check_flag, check_whole_number


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images (N, C, H, W) uint8 and their labels (N,) int64."""

    images: Tensor
    labels: Tensor
    shard_size: ClassVar[int] = 1
    digest: ClassVar[str] = ""  # these sets are published ones, always the same

    @property
    def length(self) -> int:
        return len(self.labels)

    def batches(self, draws: Iterable[Draw]) -> Iterator[RawBatch]:
        for draw in draws:
            images, labels = self.images[draw.rows], self.labels[draw.rows]
            yield RawBatch(images, labels, draw.corners, draw.flips)


class ResidentImages:
    """Labelled images on a device, with every crop of every image as a view.

    They take N·C·(H + 2·pad)·(W + 2·pad) bytes there, and twice that if they are mirrored: the
    mirror images lie behind the others, so that a flip is another row of the same gather. `windows`
    are the view (N or 2N, C, 2·pad + 1, 2·pad + 1, H, W).
    """

    def __init__(
        self,
        source: LabelledImages,
        augmentation: Augmentation = NO_AUGMENTATION,
        device: torch.device | None = None,
    ) -> None:
        self.source = source
        self.length, self.shard_size, self.digest = source.length, source.shard_size, source.digest
        self.augmentation = augmentation
        self.device = device or torch.device("cpu")
        height, width = source.images.shape[-2:]
        images, self.labels = source.images.to(self.device), source.labels.to(self.device)
        padded = F.pad(images, (augmentation.pad,) * 4)
        if augmentation.flip:
            padded = torch.cat([padded, padded.flip(-1)])
            self.labels = self.labels.repeat(2)
        self.windows = padded.unfold(2, height, 1).unfold(3, width, 1)

    def batches(self, draws: Iterable[Draw]) -> Iterator[RawBatch]:
        """Yield the batch of each draw, cropped and mirrored already, in their order."""
        drawn = list(draws)
        if not drawn:
            return
        places = self._places(drawn).to(self.device)
        sizes = [len(draw.rows) for draw in drawn]
        columns = (*places, self.labels[places[0]])
        parts = (torch.split(column, sizes) for column in columns)
        for rows, tops, lefts, labels in zip(*parts, strict=True):
            yield RawBatch(self.windows[rows, :, tops, lefts], labels)

    def _places(self, drawn: list[Draw]) -> Tensor:
        """Return the indices of all draws in `windows`: rows, tops and lefts (3, B)."""
        rows = torch.cat([draw.rows for draw in drawn])
        corners = [draw.corners for draw in drawn if draw.corners is not None]
        flips = [draw.flips for draw in drawn if draw.flips is not None]
        if not corners or not flips:
            middle = torch.full_like(rows, self.augmentation.pad)
            return torch.stack([rows, middle, middle])
        tops, lefts = torch.cat(corners).unbind(1)
        mirrored = torch.cat(flips)
        # A mirror image is cropped as far from the right as the image is from the left.
        lefts = torch.where(mirrored, 2 * self.augmentation.pad - lefts, lefts)
        return torch.stack([rows + self.length * mirrored, tops, lefts])


class BatchTransform:
    """Turns a `RawBatch` into `(x, y)`: x = (crop(images) / 255 − mean) / std, (N, C, H, W).

    Mean and std, of each channel, are of images scaled to 0 … 1; `pad` pixels of zeros go around an
    image before it is cropped.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], pad: int) -> None:
        self.mean, self.std, self.pad = mean, std, pad
        self._constants: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(
        self, batch: RawBatch, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        images = batch.images
        if batch.corners is not None:
            images = crop(images, batch.corners, self.pad)
        if batch.flips is not None:
            images = mirror(images, batch.flips)
        exact = torch.promote_types(dtype, torch.float32)  # half is for the result alone
        scale, shift = self._scale_and_shift(images.device, exact)
        # In three operations, since one of uint8 with a float takes twice as long on a CPU.
        return images.to(exact).mul_(scale).add_(shift).to(dtype), batch.labels

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
    """Return images (N, C, H, W) padded and cut back to H×W; `corners` (N, 2) are in 0 … 2·pad."""
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


class ImageData(ResumableData, ABC):
    """The base of the data modules of images; test and prediction read the validation images."""

    train: ImageSource | None = None
    validation: ImageSource | None = None
    transform: BatchTransform | None = None

    def __init__(
        self, batch_size: int, augmentation: Augmentation, device_resident: bool = False
    ) -> None:
        super().__init__()
        self.device_resident = check_flag("device_resident", device_resident)
        self._resident: dict[str, ResidentImages] = {}
        self.batch_size = check_whole_number("batch_size", batch_size)
        self.augmentation = augmentation

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that the model gets."""

    @abstractmethod
    def setup(self, stage: str | None = None) -> None:
        """Find the images that the stage needs."""

    def images_a_batch(self, processes: int) -> int:
        """Return the images of a training batch on each process: all, if these are fewer."""
        if self.train is None:
            return self.batch_size
        return images_a_batch(self.train.length, self.batch_size, processes)

    def train_dataloader(self) -> TrainingBatches:
        assert self.train is not None, "setup('fit') comes first"
        images = self._place("train", self.train, self.augmentation)
        sizes = {"shard_size": images.shard_size, "digest": images.digest, **self.order_options()}
        order = AugmentedShuffle(images.length, self.batch_size, self.augmentation, **sizes)
        return self.load(images, order)

    def val_dataloader(self) -> EvaluationBatches:
        assert self.validation is not None, "setup() comes first"
        images = self._place("validation", self.validation, NO_AUGMENTATION)
        return EvaluationBatches(images, self.batch_size, shard_of(self.trainer))

    def test_dataloader(self) -> EvaluationBatches:
        return self.val_dataloader()

    def predict_dataloader(self) -> EvaluationBatches:
        return self.val_dataloader()

    def on_after_batch_transfer(
        self, batch: RawBatch, dataloader_idx: int
    ) -> tuple[Tensor, Tensor]:
        assert self.transform is not None, "setup() comes first"
        # The trained module's, float32 unless the precision is `16-true` or so.
        dtype = self.trainer.lightning_module.dtype if self.trainer else torch.float32
        assert isinstance(dtype, torch.dtype)
        return self.transform(batch, dtype)

    def teardown(self, stage: str) -> None:
        """Free the images on the device, and forget an interrupted run."""
        super().teardown(stage)
        self._resident = {}

    def _place(self, part: str, images: ImageSource, augmentation: Augmentation) -> ImageSource:
        """Return the images unchanged or, once for all loaders of a run, on its device."""
        if not self.device_resident:
            return images
        assert isinstance(images, LabelledImages), "only images in memory can be moved"
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        placed = self._resident.get(part)
        if placed is None or placed.source is not images or placed.device != device:
            placed = self._resident[part] = ResidentImages(images, augmentation, device)
        return placed
