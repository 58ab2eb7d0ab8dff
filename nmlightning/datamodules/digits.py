"""The 1,797 handwritten digits that come with scikit-learn: real images without a download."""

import torch
from torch.nn import functional as F

from nmlightning.datamodules.batches import Augmentation
from nmlightning.datamodules.image_data import BatchTransform, ImageData, LabelledImages
from nmlightning.errors import check_whole_number

ORIGINAL_SIZE = 8
BRIGHTEST = 16  # scikit-learn's digits count the dark pixels of 4×4 blocks
VALIDATION_FRACTION = 0.2
SPLIT_SEED = 0


class Digits(ImageData):
    """Scikit-learn's digits, enlarged to the size that a model expects: 1,437 train, 360 validate.

    https://archive.ics.uci.edu/dataset/80: 8×8 pixels of 0 … 16, rescaled to 0 … 255, enlarged
    bilinearly and repeated over the channels. The split is stratified and always the same, test is
    validation. Training images are shifted by up to 1/16 of their size and never mirrored, since
    the mirror image of a 3 is not a 3.

    Args:
        batch_size: images a batch, on each process.
        image_size: height and width in pixels, 8 or more.
        channels: how often the grey image is repeated.
        device_resident: keep the images on the device that trains, 7 MB at the defaults; False
            picks each batch on the host.

    Raises:
        InputError: for an image_size below 8, or less than one channel or one image a batch.
    """

    num_classes = 10

    def __init__(
        self,
        batch_size: int = 128,
        image_size: int = 32,
        channels: int = 3,
        device_resident: bool = True,
    ) -> None:
        check_whole_number("image_size", image_size, ORIGINAL_SIZE)
        augmentation = Augmentation(pad=image_size // 16, flip=False)
        super().__init__(batch_size, augmentation, device_resident)
        self.image_size = image_size
        self.channels = check_whole_number("channels", channels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.channels, self.image_size, self.image_size

    def setup(self, stage: str | None = None) -> None:
        """Load, enlarge and split the images; they are few, so every stage gets both parts."""
        if self.train is None:
            self.train, self.validation = _split(_load(self.image_size, self.channels))
            pixels = self.train.images.double() / 255
            mean, std = pixels.mean().item(), pixels.std().item()
            self.transform = BatchTransform(
                (mean,) * self.channels, (std,) * self.channels, self.augmentation.pad
            )


def _load(image_size: int, channels: int) -> LabelledImages:
    from sklearn.datasets import load_digits  # 1 s to import: only where it is used

    digits = load_digits()
    grey = torch.from_numpy(digits.images).float().unsqueeze(1) * (255 / BRIGHTEST)
    enlarged = F.interpolate(grey, size=(image_size, image_size), mode="bilinear")
    images = enlarged.round().to(torch.uint8).repeat(1, channels, 1, 1)
    return LabelledImages(images, torch.from_numpy(digits.target).long())


def _split(digits: LabelledImages) -> tuple[LabelledImages, LabelledImages]:
    from sklearn.model_selection import train_test_split

    labels = digits.labels.numpy()
    rows = torch.arange(len(labels)).numpy()
    parts = train_test_split(
        rows, test_size=VALIDATION_FRACTION, stratify=labels, random_state=SPLIT_SEED
    )
    train, validation = (LabelledImages(digits.images[part], digits.labels[part]) for part in parts)
    return train, validation
