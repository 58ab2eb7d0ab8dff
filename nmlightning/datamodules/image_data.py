"""What the data modules of images share: their loaders, and the arithmetic on the device."""

from abc import ABC, abstractmethod

from torch import Tensor

from nmlightning.datamodules.batch_transform import BatchTransform
from nmlightning.datamodules.batches import (
    Augmentation,
    Draw,
    EvaluationBatches,
    ImageSource,
    RawBatch,
    evaluation_batches,
    images_a_batch,
    training_batches,
)
from nmlightning.datamodules.precision import input_dtype
from nmlightning.datamodules.resumable_data import ResumableData
from nmlightning.datamodules.training_batches import TrainingBatches
from nmlightning.errors import check_whole_number


class ImageData(ResumableData, ABC):
    """Images to train with and images to validate with, which test and prediction read, too.

    Args:
        batch_size: images a batch, on each process.
        augmentation: what is drawn for a training image and done to it on the device.

    Attributes:
        train, validation: the images, from `setup` on.
        transform: the arithmetic, from `setup` on at the latest.
    """

    train: ImageSource | None = None
    validation: ImageSource | None = None
    transform: BatchTransform | None = None

    def __init__(self, batch_size: int, augmentation: Augmentation) -> None:
        super().__init__()
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
            self.train, self.batch_size, self.augmentation, self.trainer, self.interrupted
        )
        self.sampler = batches.sampler
        return batches

    def val_dataloader(self) -> EvaluationBatches:
        assert self.validation is not None, "setup() comes first"
        return evaluation_batches(self.validation, self.batch_size, self.trainer)

    def test_dataloader(self) -> EvaluationBatches:
        return self.val_dataloader()

    def predict_dataloader(self) -> EvaluationBatches:
        return self.val_dataloader()

    def on_after_batch_transfer(
        self, batch: RawBatch, dataloader_idx: int
    ) -> tuple[Tensor, Tensor]:
        assert self.transform is not None, "setup() comes first"
        return self.transform(batch, input_dtype(self.trainer))
