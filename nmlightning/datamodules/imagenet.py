"""ImageNet (Russakovsky et al., 2015; https://www.image-net.org), read from its files."""

from pathlib import Path

from lightning_fabric.utilities.data import suggested_max_num_workers
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from nmlightning.datamodules.batch_transform import BatchTransform
from nmlightning.datamodules.batches import Augmentation
from nmlightning.datamodules.image_data import ImageData
from nmlightning.datamodules.image_files import ImageFiles, read_image
from nmlightning.errors import InputError, check_whole_number

# Of the training images, scaled to 0 … 1: https://docs.pytorch.org/vision/stable/models.html.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
SHORT_SIDE = 256 / 224  # of an image before its centre is cropped, over the size of the crop
IN_THE_WORKERS = Augmentation(pad=0, flip=False)  # nothing is left for the device to augment
MENTIONED = 3  # classes in an error


class ImageNet(ImageData):
    """ImageNet, or any images laid out like it: `root/train/<class>/*` and `root/val/<class>/*`.

    Training images are cropped at random (8 to 100 % of the area, sides 3:4 to 4:3), resized to
    `image_size` and mirrored at random (Szegedy et al. 2015, https://arxiv.org/abs/1409.4842). The
    others are resized to a short side of 256/224 · image_size and cropped at the centre. Test and
    prediction are validation: the labels of ImageNet's own test images are not public.

    Workers decode and crop, uint8 travels, and the device normalises. The order and the
    augmentation follow from `seed_everything` and the epoch, also after a resume, with several
    processes and with any number of workers (see `AugmentedShuffle`).

    Args:
        root: folder that holds the folders train and val.
        batch_size: images a batch, on each process.
        num_workers: processes that decode, for each process that trains; 0 decodes in the latter,
            None takes the cores that it has, but one.
        image_size: height and width in pixels of what the model gets.

    Raises:
        InputError: if train or val is absent, both are one folder or their classes differ; for a
            class without images; for less than one image a batch or one pixel; in iterating, for a
            file that is no image.
    """

    num_classes: int  # known from `setup` on

    def __init__(
        self,
        root: str = "data/imagenet",
        batch_size: int = 256,
        num_workers: int | None = None,
        image_size: int = 224,
    ) -> None:
        super().__init__(batch_size, IN_THE_WORKERS)
        self.root = Path(root).expanduser().absolute()
        if num_workers is not None:
            check_whole_number("num_workers", num_workers, least=0)
        self.num_workers = num_workers
        self.image_size = check_whole_number("image_size", image_size)
        self.transform = BatchTransform(MEAN, STD, IN_THE_WORKERS.pad)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that the model gets."""
        return len(MEAN), self.image_size, self.image_size

    def setup(self, stage: str | None = None) -> None:
        """Check the folders and list the files that the stage needs."""
        train, validation = self.root / "train", self.root / "val"
        self.num_classes = len(_common_classes(train, validation))
        if self.train is None and stage in (None, "fit"):
            self.train = self._list_files(train, _training_steps(self.image_size))
        if self.validation is None:
            self.validation = self._list_files(validation, _evaluation_steps(self.image_size))

    def _list_files(self, folder: Path, steps: list[nn.Module]) -> ImageFiles:
        transform = v2.Compose([*steps, v2.PILToTensor()])
        try:
            files = ImageFolder(folder, transform, loader=read_image)
        except FileNotFoundError as error:  # it names the classes that are empty
            raise InputError(f"{folder} lacks images, see --data.root. {error}") from error
        processes = self.trainer.num_devices if self.trainer else 1
        workers = self.num_workers
        return ImageFiles(
            files,
            num_workers=suggested_max_num_workers(processes) if workers is None else workers,
            pin_memory=bool(self.trainer and self.trainer.strategy.root_device.type == "cuda"),
        )


def _training_steps(image_size: int) -> list[nn.Module]:
    return [v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip()]


def _evaluation_steps(image_size: int) -> list[nn.Module]:
    return [v2.Resize(round(image_size * SHORT_SIDE)), v2.CenterCrop(image_size)]


def _common_classes(train: Path, validation: Path) -> set[str]:
    """Return the names of the classes, which both folders must have."""
    classes, others = _classes(train), _classes(validation)
    if train.samefile(validation):
        raise InputError(
            f"{train} and {validation} are the same folder, so validation would measure the "
            "training images: give --data.root a folder where they are not."
        )
    differing = sorted(classes ^ others)
    if differing:
        more = f" and {len(differing) - MENTIONED} more" if len(differing) > MENTIONED else ""
        raise InputError(
            f"{train} has {len(classes)} classes and {validation} {len(others)}, and they differ "
            f"in {', '.join(differing[:MENTIONED])}{more}: make them the same, or give another "
            "folder with --data.root."
        )
    return classes


def _classes(folder: Path) -> set[str]:
    if not folder.is_dir():
        raise InputError(
            f"there is no folder {folder}: name the folder that holds train and val with "
            "--data.root."
        )
    classes = {path.name for path in folder.iterdir() if path.is_dir()}
    if not classes:
        raise InputError(
            f"{folder} holds no folders: put the images of each class into a folder of its own, or "
            "name another folder with --data.root."
        )
    return classes
