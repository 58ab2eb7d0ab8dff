"""Images in a file each, in a folder for each class: torchvision's `ImageFolder` layout."""

from pathlib import Path

from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from nmlightning.datamodules.decoded_images import Damaged
from nmlightning.datamodules.encoded_image import EncodedImage
from nmlightning.errors import InputError

MENTIONED = 3  # names in an error


class FolderImages:
    """The images below `folder/<class>/`, in the order of their paths.

    Args:
        folder: holds a folder for each class; their order by name numbers the classes.
        damaged: what to do about files that are no images by the ending of their name: an error,
            or a warning that counts and names them.

    Raises:
        InputError: for a class without images, or for a file that is no image.
    """

    shard_size = 1

    def __init__(self, folder: Path, damaged: Damaged = "error") -> None:
        self.folder = folder
        strangers: list[str] = []

        def is_image(path: str) -> bool:
            known = path.lower().endswith(IMG_EXTENSIONS)
            if not known:
                strangers.append(path)
            return known

        try:
            files = ImageFolder(folder, is_valid_file=is_image)
        except FileNotFoundError as error:  # it names the classes that are empty
            raise InputError(f"{folder} lacks images. {error}") from error
        self.files: list[tuple[str, int]] = files.samples
        self.classes: list[str] = files.classes
        _report_strangers(folder, strangers, damaged)

    @property
    def length(self) -> int:
        return len(self.files)

    def fetch(self, row: int) -> EncodedImage:
        path, label = self.files[row]
        return EncodedImage(path, path, label)


def common_classes(train: Path, validation: Path) -> set[str]:
    """Return the names of the classes of two folders, which both must have.

    Raises:
        InputError: if a folder is absent or without classes, if they are the same folder, or if
            their classes differ.
    """
    classes, others = _classes(train), _classes(validation)
    if train.samefile(validation):
        raise InputError(
            f"{train} and {validation} are the same folder, so validation would measure the "
            "training images: give a folder where they are not."
        )
    differing = sorted(classes ^ others)
    if differing:
        raise InputError(
            f"{train} has {len(classes)} classes and {validation} {len(others)}, and they differ "
            f"in {_name_some(differing)}: make them the same, or give another folder."
        )
    return classes


def _classes(folder: Path) -> set[str]:
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}: give the folder that holds train and val.")
    classes = {path.name for path in folder.iterdir() if path.is_dir()}
    if not classes:
        raise InputError(
            f"{folder} holds no folders: put the images of each class into a folder of its own, or "
            "give another folder."
        )
    return classes


def _report_strangers(folder: Path, strangers: list[str], damaged: Damaged) -> None:
    if not strangers:
        return
    what = f"{folder} holds files that are no images by their names, {len(strangers)} in all"
    names = [str(Path(path).relative_to(folder)) for path in strangers]
    if damaged == "error":
        raise InputError(
            f"{what}: {_name_some(names)}. Delete them, or leave them out with damaged: skip."
        )
    rank_zero_warn(f"Skipped: {what}: {', '.join(names)}")


def _name_some(names: list[str]) -> str:
    more = f" and {len(names) - MENTIONED} more" if len(names) > MENTIONED else ""
    return f"{', '.join(names[:MENTIONED])}{more}"
