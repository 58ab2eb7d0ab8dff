"""Images that lie in a file each and are decoded by worker processes."""

from collections.abc import Iterable, Iterator

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import pil_loader

from nmlightning.datamodules.batches import Draw, RawBatch
from nmlightning.errors import InputError

DrawnImage = tuple[int, int]  # its row, and the seed of what is random in its transform
LabelledImage = tuple[Tensor, int]


class ImageFiles:
    """The images of a folder, decoded and transformed by workers while the device trains.

    What is random in the transform of an image is drawn from the seed that the image has in its
    `Draw` and from nothing else, whichever worker decodes it.

    Args:
        folder: images by class; its transform returns (C, H, W) uint8.
        num_workers: processes that decode; 0 decodes in this one.
        pin_memory: whether to hand out page-locked memory, which a CUDA device copies faster.

    Raises:
        InputError: in iterating, if a file is no image or damaged; it names the file.
    """

    def __init__(self, folder: ImageFolder, num_workers: int, pin_memory: bool) -> None:
        self.labels = torch.tensor(folder.targets)
        self.images = _SeededImages(folder)
        self.num_workers = num_workers
        self.pin_memory = pin_memory

    def batches(self, draws: Iterable[Draw]) -> Iterator[RawBatch]:
        """Yield the batch of each draw, in their order; images (B, C, H, W) uint8."""
        loader = DataLoader(
            self.images,
            batch_sampler=map(_drawn_images, draws),
            num_workers=self.num_workers,
            collate_fn=_collate,
            pin_memory=self.pin_memory,
        )
        for batch in loader:
            if isinstance(batch, InputError):
                raise batch
            yield RawBatch(*batch)


def read_image(path: str) -> Image.Image:
    """Return the image as RGB; InputError that names the file if it cannot be decoded."""
    try:
        image: Image.Image = pil_loader(path)
        return image
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
        raise InputError(
            f"{path} cannot be read as an image ({error}): replace or delete it."
        ) from error


class _SeededImages(Dataset[LabelledImage | InputError]):
    """Reads an image under its own seed; returns an InputError, which thus crosses processes."""

    def __init__(self, folder: ImageFolder) -> None:
        self.folder = folder

    def __getitem__(self, drawn: DrawnImage) -> LabelledImage | InputError:
        row, seed = drawn
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            try:
                image: LabelledImage = self.folder[row]
                return image
            except InputError as error:
                return error


def _drawn_images(draw: Draw) -> list[DrawnImage]:
    seeds = draw.rows if draw.seeds is None else draw.seeds  # any will do where nothing is random
    return list(zip(draw.rows.tolist(), seeds.tolist(), strict=True))


def _collate(images: list[LabelledImage | InputError]) -> list[Tensor] | InputError:
    """Return images (B, C, H, W) and labels (B,), or the first error."""
    errors = (image for image in images if isinstance(image, InputError))
    return next(errors, None) or default_collate(images)
