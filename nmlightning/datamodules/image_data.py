"""What the data modules of images share: their loaders, and the arithmetic on the device."""

from abc import ABC, abstractmethod

import pytorch_lightning as pl
from torch import Tensor

from nmlightning.datamodules.batch_transform import BatchTransform
from nmlightning.datamodules.batches import (
    Augmentation,
    AugmentedShuffle,
    EvaluationBatches,
    ImageSource,
    OrderState,
    RawBatch,
    TrainingBatches,
    evaluation_batches,
    images_a_batch,
    training_batches,
)
from nmlightning.datamodules.precision import input_dtype
from nmlightning.errors import check_whole_number


class ImageData(pl.LightningDataModule, ABC):
    """Images to train with and images to validate with, which test and prediction read, too.

    A resumed run goes on with the order that it began, within an epoch with the very next batch.
    Lightning's checkpoint holds how many batches of the epoch are done, and the state of this
    module what their order follows from.

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
        self._interrupted: OrderState | None = None
        self._sampler: AugmentedShuffle | None = None

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

    def train_dataloader(self) -> TrainingBatches:
        assert self.train is not None, "setup('fit') comes first"
        batches = training_batches(
            self.train, self.batch_size, self.augmentation, self.trainer, self._interrupted
        )
        self._sampler = batches.sampler
        return batches

    def state_dict(self) -> OrderState:
        """Return the seed of the order, what the images are and how they are batched."""
        return self._sampler.state_dict() if self._sampler else {}

    def load_state_dict(self, state_dict: OrderState) -> None:
        """Let the next training loader go on with the order of the run that was interrupted."""
        self._interrupted = dict(state_dict)

    def teardown(self, stage: str) -> None:
        """Forget the interrupted run: the next one may be another."""
        self._interrupted = None

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
