"""CIFAR-10 (Krizhevsky, 2009; https://www.cs.toronto.edu/~kriz/cifar.html), held in memory."""

from pathlib import Path

import torch
from torchvision.datasets import CIFAR10 as Files
from torchvision.datasets.utils import check_integrity, download_and_extract_archive

from nmlightning.datamodules.batches import Augmentation
from nmlightning.datamodules.image_data import BatchTransform, ImageData, LabelledImages
from nmlightning.errors import InputError, check_flag

# Over all pixels of the 50,000 training images, scaled to 0 … 1; computed from them in the tests.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
AUGMENTATION = Augmentation(pad=4, flip=True)  # He et al. (2016), section 4.2


class CIFAR10(ImageData):
    """CIFAR-10: 50,000 training images of 32×32, shifted by up to 4 pixels and mirrored.

    Validation and test are both the 10,000 test images, without augmentation: the protocol of the
    paper, which reports the test error after the last epoch and selects nothing by it.

    The order and the augmentation follow from `seed_everything` and the epoch, also after a resume
    and with several processes (see `AugmentedShuffle`).

    Args:
        root: folder that holds `cifar-10-batches-py`, or into which it is downloaded (170 MB).
        batch_size: images a batch, on each process.
        download: whether to download what is absent.
        device_resident: keep the images on the device that trains, on a CPU in its memory, and cut
            batches there, nearly twice as fast; 480 MB for the padded training images and their
            mirror images, 31 MB for the others, on each process. False picks each batch on the
            host.

    Raises:
        InputError: if the files are absent and cannot be downloaded, or differ from the published
            ones; for less than one image a batch.
    """

    num_classes = 10
    image_shape = (3, 32, 32)

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        download: bool = True,
        device_resident: bool = True,
    ) -> None:
        super().__init__(batch_size, AUGMENTATION, device_resident)
        self.root = Path(root).expanduser().absolute()
        self.download = check_flag("download", download)
        self.transform = BatchTransform(MEAN, STD, AUGMENTATION.pad)

    def prepare_data(self) -> None:
        """Download what is absent; Lightning calls this in one process."""
        _refuse_altered_files(self.root)
        if self.download and _absent_files(self.root):
            _download(self.root)

    def setup(self, stage: str | None = None) -> None:
        """Check the files and load what the stage needs."""
        _refuse_altered_files(self.root)
        if _absent_files(self.root):
            raise InputError(
                f"{_describe_absence(self.root)}: name the folder above it with --data.root, "
                "download it with --data.download true, or train on --data Digits, which needs no "
                "download."
            )
        if self.train is None and stage in (None, "fit"):
            self.train = _load(self.root, train=True)
        if self.validation is None:
            self.validation = _load(self.root, train=False)


def _load(root: Path, train: bool) -> LabelledImages:
    files = Files(root, train=train)
    images = torch.from_numpy(files.data).permute(0, 3, 1, 2).contiguous()
    return LabelledImages(images, torch.tensor(files.targets))


def _published_files(root: Path) -> dict[Path, str]:
    """Return every file that the data set consists of, with its published MD5 sum."""
    meta = (Files.meta["filename"], Files.meta["md5"])
    entries = [*Files.train_list, *Files.test_list, meta]
    return {root / Files.base_folder / name: md5 for name, md5 in entries}


def _absent_files(root: Path) -> list[Path]:
    return [path for path in _published_files(root) if not path.is_file()]


def _describe_absence(root: Path) -> str:
    absent, folder = _absent_files(root), root / Files.base_folder
    if len(absent) == len(_published_files(root)):
        return f"CIFAR-10 is not in {folder}"
    return f"CIFAR-10 in {folder} lacks {', '.join(path.name for path in absent)}"


def _refuse_altered_files(root: Path) -> None:
    for path, md5 in _published_files(root).items():
        if path.is_file() and not check_integrity(path, md5):
            raise InputError(
                f"{path} is truncated or altered (its MD5 sum is not the published {md5}), so "
                "nothing was loaded: delete that file and run again with --data.download true."
            )


def _download(root: Path) -> None:
    new_folders = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        download_and_extract_archive(Files.url, root, filename=Files.filename, md5=Files.tgz_md5)
    except (OSError, RuntimeError) as error:
        for folder in new_folders:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise InputError(
            f"{_describe_absence(root)} and could not be downloaded from {Files.url} ({error}): "
            "name the folder above it with --data.root, or train on --data Digits, which needs no "
            "download."
        ) from error
