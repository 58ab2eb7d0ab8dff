"""Writes images in files as shards of litdata's, their content as it is."""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from nmlightning.datamodules.decoded_images import Damaged
from nmlightning.datamodules.encoded_image import DamagedImage, EncodedImage, decode, digest_of
from nmlightning.datamodules.image_folder import FolderImages
from nmlightning.datamodules.image_shards import FORMAT, INDEX, Item, require_litdata
from nmlightning.errors import InputError

ORDER_SEED = 0


class ShardWriter:
    """Writes parts of a data set below a folder.

    Training images are written in an order drawn once, since an epoch mixes few shards at a time:
    in the order of the folder these would be of few classes. Every image is decoded once, to know
    that it can be.

    Args:
        out: an empty folder.
        shard_size: images a shard.
        damaged: whether an image that cannot be decoded is an error or left out.

    Attributes:
        skipped: of images that were left out the reason, by name.

    Raises:
        InputError: without litdata; in writing, for a damaged image.
    """

    def __init__(self, out: Path, shard_size: int, damaged: Damaged) -> None:
        require_litdata()
        self.out = out
        self.shard_size = shard_size
        self.damaged = damaged
        self.skipped: dict[str, str] = {}
        self.images: dict[str, int] = {}
        self.digests: dict[str, str] = {}

    def write(self, images: FolderImages, part: str, report: Callable[[int], object]) -> None:
        """Write a part, `train` or `val`; `report` gets the number of images that were done."""
        rows = torch.arange(images.length)
        if part == "train":
            generator = torch.Generator().manual_seed(ORDER_SEED)
            rows = torch.randperm(images.length, generator=generator)
        writer = _new_writer(self.out / part, self.shard_size)
        written: list[tuple[str, int]] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside Python's lock
            for few in torch.split(rows, self.shard_size):
                fetched = [images.fetch(row) for row in few.tolist()]
                for item in pool.map(partial(self._encode, images), fetched):
                    if item is not None:
                        label, name, _ = writer[len(written)] = item
                        written.append((name, label))
                report(len(fetched))
        if not written:
            raise InputError(f"none of the {images.length} images in {images.folder} can be read.")
        _finish(writer)
        self.images[part] = len(written)
        self.digests[part] = digest_of(written)

    def write_index(self, classes: Sequence[str]) -> None:
        """Write what was written; the last step, without which the rest is not read."""
        index = {
            "format": FORMAT,
            "classes": list(classes),
            "shard_size": self.shard_size,
            "images": self.images,
            "digests": self.digests,
        }
        writer = _new_writer(self.out / INDEX, shard_size=1)
        writer[0] = (json.dumps(index).encode(),)
        _finish(writer)

    def _encode(self, images: FolderImages, image: EncodedImage) -> Item | None:
        """Return the item of an image, or None if it is damaged and left out."""
        try:
            content = _read(image)
            decode(image._replace(file=BytesIO(content)))
        except DamagedImage as error:
            if self.damaged == "error":
                raise
            self.skipped[error.name] = error.reason
            return None
        return image.label, images.name_within(str(image.file)), content


def _read(image: EncodedImage) -> bytes:
    assert isinstance(image.file, str), "of a folder"
    try:
        return Path(image.file).read_bytes()
    except OSError as error:
        raise DamagedImage(image.name, str(error)) from error


def _new_writer(folder: Path, shard_size: int) -> Any:
    from litdata.streaming import Cache

    folder.mkdir()
    return Cache(str(folder), chunk_size=shard_size)


def _finish(writer: Any) -> None:
    writer.done()
    writer.merge()
