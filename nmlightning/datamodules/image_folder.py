"""Images in a file each, in a folder for each class: torchvision's `ImageFolder` layout."""

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torchvision.datasets.folder import IMG_EXTENSIONS

from nmlightning.datamodules.decoded_images import Damaged, EncodedImage, digest_of, printable
from nmlightning.errors import InputError
from nmlightning.name_patterns import some

MENTIONED = 3  # names in an error


class FolderImages:
    """The images below `folder/<class>/`, in the order of their paths; classes count by name.

    Files and folders whose name begins with a dot are passed over: they are other programs'. Files
    that are no images by their ending are an error, or counted and named in a warning.
    """

    shard_size = 1

    def __init__(self, folder: Path, damaged: Damaged = "error") -> None:
        self.folder = folder
        self.classes = sorted(_classes(folder))
        self.files: list[tuple[str, int]] = []
        not_images: list[str] = []
        seen = {os.path.realpath(folder): str(folder)}
        for label, name in enumerate(self.classes):
            for path in _list_files(str(folder / name), seen):
                if path.lower().endswith(IMG_EXTENSIONS):
                    self.files.append((path, label))
                else:
                    not_images.append(path)
        filled = {label for _, label in self.files}
        empty = [name for label, name in enumerate(self.classes) if label not in filled]
        if empty:
            raise InputError(
                f"{folder} has no images of {some(empty, MENTIONED)}: put some there, or delete "
                "the folder of that name in train and in val."
            )
        self.length = len(self.files)
        if not_images:
            what = (
                f"{folder} holds files that are not images by their names, {len(not_images)} in all"
            )
            names = [printable(str(Path(path).relative_to(folder))) for path in not_images]
            if damaged == "error":
                delete = "Delete them, or leave them out with damaged: skip."
                raise InputError(f"{what}: {some(names, MENTIONED)}. {delete}")
            rank_zero_warn(f"Skipped: {what}: {', '.join(names)}")

    @cached_property
    def digest(self) -> str:
        return digest_of((self.name_within(path), label) for path, label in self.files)

    def name_within(self, path: str) -> str:
        """Return `<class>/<file>` of an image's path, printable and with slashes."""
        within = path.removeprefix(str(self.folder)).lstrip(os.sep)
        return printable(within.replace(os.sep, "/"))

    def fetch(self, row: int) -> EncodedImage:
        path, label = self.files[row]
        return EncodedImage(printable(path), path, label)


def common_classes(train: Path, validation: Path) -> set[str]:
    """Return the names of the classes of two folders, which have to be the same."""
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
            f"in {some(differing, MENTIONED)}: make them the same, or give another folder."
        )
    return classes


def _classes(folder: Path) -> set[str]:
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}: give the folder that holds train and val.")
    entries = [path for path in folder.iterdir() if path.name[0] != "."]
    classes = {path.name for path in entries if path.is_dir()}
    if not classes:
        raise InputError(
            f"{folder} holds no folders: put the images of each class into a folder of its own, or "
            "give another folder."
        )
    return classes


def _list_files(folder: str, seen: dict[str, str]) -> Iterator[str]:
    """Yield the files below a folder, also through links, by path; `seen` has the real paths."""
    listed = []
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            raise InputError(
                f"{place} and {seen[real]} are the same folder, so its images would be read twice: "
                "delete the link."
            )
        seen[real] = place
        folders[:] = [name for name in folders if name[0] != "."]
        listed.append((place, files))
    for place, files in sorted(listed):
        yield from (os.path.join(place, name) for name in sorted(files) if name[0] != ".")
