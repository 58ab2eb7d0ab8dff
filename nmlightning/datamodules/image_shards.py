"""Images in shards of litdata's, read or streamed, and written by `nm shard`."""

import json
import os
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nmlightning.datamodules import decoded_images
from nmlightning.datamodules.image_folder import FolderImages
from nmlightning.errors import InputError

REMOTE = ("s3://", "gs://", "r2://", "azure://", "local:")  # what litdata streams shards from
INDEX = "classes"  # the folder, beside those of the images, of the one item that describes them
LITDATA_INDEX = "index.json"
FORMAT = 2
UNREADABLE = (RuntimeError, ValueError, struct.error)  # litdata's, of shards that were overwritten
Item = tuple[int, str, bytes]  # label, <class>/<file>, the file's content
ITEM_FORMAT, INDEX_FORMAT = ["int", "str", "bytes"], ["bytes"]


class ShardIndex(NamedTuple):
    """The content of the shards below a root: classes, and images and digest of each part."""

    classes: list[str]
    shard_size: int
    images: dict[str, int]
    digests: dict[str, str]


class ShardedImages:
    """The images of one part, train or val, below a root of shards.

    Where the root is remote, one of `REMOTE`, litdata keeps what it has fetched in its cache, shard
    by shard.
    """

    def __init__(self, root: str, part: str, index: ShardIndex) -> None:
        self.place = join_root(root, part)
        self.length = index.images[part]
        self.shard_size = index.shard_size
        self.digest = index.digests[part]
        self._shards: Any = None  # opened in the process that reads
        if not is_remote(root):
            _check_files(Path(self.place), self.length)
            _check_format(Path(self.place, LITDATA_INDEX), ITEM_FORMAT)

    def fetch(self, row: int) -> decoded_images.EncodedImage:
        if self._shards is None:
            self._shards = open_shards(self.place, ITEM_FORMAT)
        try:
            label, name, content = self._shards[row]
        except UNREADABLE as error:
            shard = join_root(self.place, f"chunk-0-{row // self.shard_size}.bin")
            raise InputError(f"{shard} cannot be read ({error}): copy it again.") from error
        return decoded_images.EncodedImage(join_root(self.place, name), BytesIO(content), label)


def is_remote(root: str) -> bool:
    return root.startswith(REMOTE)


def holds_shards(root: str) -> bool:
    """Return True if shards, and not images in files, lie below the root."""
    parts = (INDEX, "train", "val")
    return is_remote(root) or any(Path(root, part, LITDATA_INDEX).is_file() for part in parts)


def join_root(root: str, name: str) -> str:
    """Return the name below a root, which is a folder or an address."""
    return f"{root.rstrip('/')}/{name}"


def read_index(root: str) -> ShardIndex:
    place = join_root(root, INDEX)
    if not is_remote(root):
        _check_files(Path(place), images=1)
    try:
        (content,) = open_shards(place, INDEX_FORMAT)[0]
        index = json.loads(bytes(content))
    except InputError:
        raise
    except (OSError, *UNREADABLE) as error:
        raise InputError(
            f"{place} cannot be read as nm shard wrote it ({error}): copy it again, or give "
            "another folder or address."
        ) from error
    if index.pop("format", None) != FORMAT:
        raise InputError(f"the shards at {root} are of another version: write them anew.")
    return ShardIndex(**index)


def open_shards(place: str, data_format: list[str]) -> Any:
    """Return litdata's reader; InputError for items such as pickle, which runs what it names."""
    require_litdata()
    from litdata import StreamingDataset

    # Otherwise it reads the whole shard again for every item.
    shards = StreamingDataset(place, batch_decode="all")
    _check_format(Path(shards.input_dir.path, LITDATA_INDEX), data_format)
    shards[0]  # opens it
    shards.on_demand_bytes = False  # a shard at a time, not two requests an image
    return shards


def _check_format(index: Path, data_format: list[str]) -> None:
    """Refuse an index, where a remote one was copied to, by which litdata would run code."""
    try:
        config = json.loads(index.read_text(encoding="utf-8"))["config"]
        nodes: list[dict[str, Any]] = []
        json.loads(config["data_spec"], object_hook=nodes.append)
        plain = {str(node["type"]) for node in nodes} <= {"builtins.tuple", "None"}
        found = config["data_format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index} is cut off or damaged: copy it again.") from error
    if not plain or found != data_format:
        raise InputError(
            f"{index} describes items of {found} where nm shard writes {data_format}; others may "
            "run code, and are not opened."
        )


def require_litdata() -> None:
    if find_spec("litdata") is None:
        raise InputError("shards need litdata: pip install litdata.")


def _check_files(folder: Path, images: int) -> None:
    """Compare a local folder with litdata's index of it, and its images with how many they are."""
    shards = _list_files(folder)
    found = sum(count for count, _ in shards.values())
    if found != images:
        raise InputError(
            f"{folder} holds {found} images where {images} were written: it is from other shards."
        )
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    damaged = [name for name, (_, size) in shards.items() if sizes.get(name) != size]
    if damaged:
        raise InputError(
            f"{len(damaged)} of {len(shards)} shards in {folder} are absent or cut off, such as "
            f"{damaged[0]}: copy them again."
        )


def _list_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the images and bytes of each shard that litdata's index of a local folder lists."""
    path = folder / LITDATA_INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        return {
            shard["filename"]: (int(shard["chunk_size"]), int(shard["chunk_bytes"]))
            for shard in index["chunks"]
        }
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} holds no shards: write them again with nm shard, or give another folder."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is cut off or damaged: copy it again.") from error


ORDER_SEED = 0


class ShardWriter:
    """Writes parts of a data set below an empty folder; `skipped` are damaged images, with reasons.

    Training images are written in an order drawn once, since an epoch mixes few shards at a time:
    in the order of the folder these would be of few classes. Every image is decoded once, to know
    that it can be.
    """

    def __init__(self, out: Path, shard_size: int, damaged: decoded_images.Damaged) -> None:
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
        writer.done()
        writer.merge()
        self.images[part] = len(written)
        self.digests[part] = decoded_images.digest_of(written)

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
        writer.done()
        writer.merge()

    def _encode(self, images: FolderImages, image: decoded_images.EncodedImage) -> Item | None:
        """Return the item of an image, or None if it is damaged and left out."""
        try:
            assert isinstance(image.file, str), "of a folder"
            try:
                content = Path(image.file).read_bytes()
            except OSError as error:
                raise decoded_images.DamagedImage(image.name, str(error)) from error
            decoded_images.decode(image._replace(file=BytesIO(content)))
        except decoded_images.DamagedImage as error:
            if self.damaged == "error":
                raise
            self.skipped[error.name] = error.reason
            return None
        return image.label, images.name_within(str(image.file)), content


def _new_writer(folder: Path, shard_size: int) -> Any:
    from litdata.streaming import Cache

    folder.mkdir()
    return Cache(str(folder), chunk_size=shard_size)
