"""ImageNet (Russakovsky et al., 2015; https://www.image-net.org), read from its files or shards."""

from pathlib import Path
from typing import get_args

from lightning_fabric.utilities.data import suggested_max_num_workers
from torch import nn
from torchvision.transforms import v2

from nmlightning.datamodules import image_shards
from nmlightning.datamodules.batches import NO_AUGMENTATION
from nmlightning.datamodules.decoded_images import Damaged, DecodedImages, EncodedImages
from nmlightning.datamodules.image_data import BatchTransform, ImageData
from nmlightning.datamodules.image_folder import FolderImages, common_classes
from nmlightning.errors import InputError, check_choice, check_whole_number

# Of the training images, scaled to 0 … 1: https://docs.pytorch.org/vision/stable/models.html.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
SHORT_SIDE = 256 / 224  # of an image before its centre is cropped, over the size of the crop


class ImageNet(ImageData):
    """ImageNet, or any images laid out like it: `root/train/<class>/*` and `root/val/<class>/*`.

    The root may also hold the shards that `nm shard` makes of such folders, here or behind an
    address such as s3://bucket/imagenet; those need `pip install litdata`.

    Training images are cropped at random (8 to 100 % of the area, sides 3:4 to 4:3), resized to
    `image_size` and mirrored at random (Szegedy et al. 2015, https://arxiv.org/abs/1409.4842). The
    others are resized to a short side of 256/224 · image_size and cropped at the centre. Test and
    prediction are validation: the labels of ImageNet's own test images are not public.

    Workers decode and crop, uint8 travels, and the device normalises. The order and the
    augmentation follow from `seed_everything` and the epoch, also after a resume, with several
    processes and with any number of workers (see `AugmentedShuffle`); of shards few at a time are
    mixed (see `shuffle_rows`).

    Args:
        root: folder that holds the folders train and val, or what `nm shard` wrote, or the address
            of the latter.
        batch_size: images a batch, on each process.
        num_workers: processes that decode, for each process that trains; 0 decodes in the latter,
            None takes the cores that it has, but one.
        image_size: height and width in pixels of what the model gets.
        damaged: `error`, or `skip` to leave out damaged images and other files, with a warning
            that counts and names them (see `DecodedImages`).

    Raises:
        InputError: if train or val is absent, both are one folder or their classes differ; for a
            class without images; for less than one image a batch or one pixel; in iterating, for a
            file that is not an image.
    """

    num_classes: int  # known from `setup` on

    def __init__(
        self,
        root: str = "data/imagenet",
        batch_size: int = 256,
        num_workers: int | None = None,
        image_size: int = 224,
        damaged: Damaged = "error",
    ) -> None:
        super().__init__(batch_size, NO_AUGMENTATION)  # nothing is left for the device
        is_remote = image_shards.is_remote(root)
        if "://" in root and not is_remote:
            known = ", ".join(image_shards.REMOTE)
            raise InputError(f"shards are streamed from addresses in {known}; got {root!r}.")
        self.root = root if is_remote else str(Path(root).expanduser().absolute())
        if num_workers is not None:
            check_whole_number("num_workers", num_workers, least=0)
        self.num_workers = num_workers
        self.image_size = check_whole_number("image_size", image_size)
        check_choice("damaged", damaged, get_args(Damaged))
        self.damaged = damaged
        self.transform = BatchTransform(MEAN, STD, NO_AUGMENTATION.pad)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return len(MEAN), self.image_size, self.image_size

    def setup(self, stage: str | None = None) -> None:
        """Check the folders or shards and list the images that the stage needs."""
        holds_shards = image_shards.holds_shards(self.root)
        shards = image_shards.read_index(self.root) if holds_shards else None
        folders = Path(self.root, "train"), Path(self.root, "val")
        self.num_classes = len(shards.classes if shards else common_classes(*folders))
        size = self.image_size
        if self.train is None and stage in (None, "fit"):
            steps = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
            self.train = self._decode("train", shards, steps)
        if self.validation is None:
            steps = [v2.Resize(round(size * SHORT_SIDE)), v2.CenterCrop(size)]
            self.validation = self._decode("val", shards, steps)

    def _decode(
        self, part: str, shards: image_shards.ShardIndex | None, steps: list[nn.Module]
    ) -> DecodedImages:
        images: EncodedImages
        if shards:
            images = image_shards.ShardedImages(self.root, part, shards)
        else:
            images = FolderImages(Path(self.root, part), self.damaged)
        processes = self.trainer.num_devices if self.trainer else 1
        workers = self.num_workers
        return DecodedImages(
            images,
            v2.Compose([*steps, v2.PILToTensor()]),
            num_workers=suggested_max_num_workers(processes) if workers is None else workers,
            pin_memory=self.pins_memory,
            damaged=self.damaged,
        )
