"""What the data modules of images share: their loaders, and the arithmetic on the device."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from nmlightning.datamodules.batch_transform import BatchTransform
from nmlightning.datamodules.batches import (
    NO_AUGMENTATION,
    Augmentation,
    Draw,
    EvaluationBatches,
    ImageSource,
    RawBatch,
    evaluation_batches,
    images_a_batch,
    training_batches,
)
from nmlightning.datamodules.in_memory import LabelledImages
from nmlightning.datamodules.precision import input_dtype
from nmlightning.datamodules.resident_images import ResidentImages
from nmlightning.datamodules.resumable_data import ResumableData
from nmlightning.datamodules.training_batches import TrainingBatches
from nmlightning.errors import check_flag, check_whole_number


class ImageData(ResumableData, ABC):
    """Images to train with and images to validate with, which test and prediction read, too.

    Args:
        batch_size: images a batch, on each process.
        augmentation: what is drawn for a training image and done to it on the device.
        device_resident: keep the images, which are in memory, on the device that trains.

    Attributes:
        train, validation: the images, from `setup` on.
        transform: the arithmetic, from `setup` on at the latest.
    """

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
        """Return the images of each training batch on each process.

        It is the `batch_size`, or less if the set, which `setup` finds, is smaller than a batch.
        """
        if self.train is None:
            return self.batch_size
        return images_a_batch(self.train.length, self.batch_size, processes)

    def train_dataloader(self) -> TrainingBatches[Draw, RawBatch]:
        assert self.train is not None, "setup('fit') comes first"
        batches = training_batches(
            self._place("train", self.train, self.augmentation),
            self.batch_size,
            self.augmentation,
            self.trainer,
            self.interrupted,
        )
        self.sampler = batches.sampler
        return batches

    def val_dataloader(self) -> EvaluationBatches:
        assert self.validation is not None, "setup() comes first"
        images = self._place("validation", self.validation, NO_AUGMENTATION)
        return evaluation_batches(images, self.batch_size, self.trainer)

    def test_dataloader(self) -> EvaluationBatches:
        return self.val_dataloader()

    def predict_dataloader(self) -> EvaluationBatches:
        return self.val_dataloader()

    def on_after_batch_transfer(
        self, batch: RawBatch, dataloader_idx: int
    ) -> tuple[Tensor, Tensor]:
        assert self.transform is not None, "setup() comes first"
        return self.transform(batch, input_dtype(self.trainer))

    def teardown(self, stage: str) -> None:
        """Free what lies on the device, and forget an interrupted run."""
        super().teardown(stage)
        self._resident = {}

    def _place(self, part: str, images: ImageSource, augmentation: Augmentation) -> ImageSource:
        """Return the images as they are or, once for all loaders of a run, on its device."""
        if not self.device_resident:
            return images
        assert isinstance(images, LabelledImages), "only images in memory can be moved"
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        placed = self._resident.get(part)
        if placed is None or placed.source is not images or placed.device != device:
            placed = self._resident[part] = ResidentImages(images, augmentation, device)
        return placed
