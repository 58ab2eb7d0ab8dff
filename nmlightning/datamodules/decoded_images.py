"""Images that are stored encoded and decoded by worker processes."""

import struct
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nmlightning.datamodules.batches import Draw, ImageRows, RawBatch
from nmlightning.errors import InputError

# What Pillow raises for damaged files.
DAMAGED = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error),
    Image.DecompressionBombError,
)
# The longer side over the shorter, which evaluation resizes to 256: 2×20,000 pixels would then be
# 256×2,560,000, of 2 GB.
THINNEST = 100
_GREYS_OF_16_BITS = ("PNG", "PPM")  # which Pillow gives as mode I, of 0 to 65,535


class EncodedImage(NamedTuple):
    """A path or bytes, by the name that an error calls it, and its class."""

    name: str
    file: str | BytesIO
    label: int


class EncodedImages(ImageRows, Protocol):
    """Stored images; those of a shard lie in one file, and `digest_of` gives their digest."""

    def fetch(self, row: int) -> EncodedImage:
        """Return the image of a row, 0 … length − 1."""


def digest_of(listed: Iterable[tuple[str, int]]) -> str:
    """Return 32 hexadecimal digits of names and labels; in another order they are others."""
    digest = sha256()
    for name, label in listed:
        digest.update(f"{label} {printable(name)}\0".encode())
    return digest.hexdigest()[:32]


class DamagedImage(InputError):
    """A stored image cannot be decoded: which, and why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"{name} cannot be read as an image ({reason}): replace or delete it, or leave such "
            "images out with damaged: skip."
        )
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type["DamagedImage"], tuple[str, str]]:
        return DamagedImage, (self.name, self.reason)  # an exception is pickled by its message


def printable(path: str) -> str:
    """Return the path with what is not UTF-8 in it, and so cannot be printed, escaped."""
    return path.encode(errors="backslashreplace").decode()


def decode(image: EncodedImage) -> Image.Image:
    """Return the image as RGB; `DamagedImage` if it cannot be decoded."""
    try:
        with Image.open(image.file) as opened:
            if max(opened.size) > THINNEST * min(opened.size):
                width, height = opened.size
                raise ValueError(f"{width}×{height}, one side over {THINNEST} times the other")
            opened.info.pop("transparency", None)  # RGB has none; of a palette's Pillow would warn
            decoded: Image.Image = _in_8_bits(opened).convert("RGB")
            return decoded
    except UnidentifiedImageError as error:  # its message may hold an address in memory
        raise DamagedImage(image.name, "of no known format") from error
    except DAMAGED as error:
        raise DamagedImage(image.name, str(error)) from error


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Return the high bytes of 16-bit greys, as Pillow reads 16-bit colours: it clips greys."""
    if image.mode == "F" or (image.mode == "I" and image.format not in _GREYS_OF_16_BITS):
        raise ValueError(f"32-bit greys (mode {image.mode}) have no known white: save 8 or 16 bits")
    if image.mode[0] != "I":
        return image
    return Image.fromarray((np.asarray(image.convert("I")) >> 8).astype(np.uint8))


Damaged = Literal["error", "skip"]
Transform = Callable[[Image.Image], Tensor]


class DecodedImages:
    """Stored images, decoded and transformed by workers while the device trains.

    What is random in the transform of an image, to (C, H, W) uint8, is drawn from the seed that the
    image has in its `Draw` and from nothing else, whichever worker decodes it; without workers this
    process does.

    Of `damaged` images each is named in one warning where they are skipped. In training the next
    readable row takes its place, under its seed: every batch keeps its size and every process its
    number of steps, whoever reads it. In evaluation it is left out of its batch, so that no image
    counts twice.
    """

    def __init__(
        self,
        images: EncodedImages,
        transform: Transform,
        num_workers: int,
        pin_memory: bool,
        damaged: Damaged = "error",
    ) -> None:
        self.reader = _Reader(images, transform, skips_damaged=damaged == "skip")
        self.length, self.shard_size = images.length, images.shard_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.skipped: set[str] = set()

    @property
    def digest(self) -> str:
        return self.reader.images.digest

    def batches(self, draws: Iterable[Draw]) -> Iterator[RawBatch]:
        """Yield the batch of each draw, in their order; images (B, C, H, W) uint8."""
        loader = DataLoader(
            self.reader,
            batch_size=None,  # a draw is a batch already
            sampler=map(_in_numbers, draws),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )
        for batch in loader:
            if isinstance(batch, InputError):
                raise batch
            for name, reason in batch.damaged.items():
                if name not in self.skipped:  # one warning for each image
                    self.skipped.add(name)
                    count = f"{len(self.skipped)} of {self.length} so far"
                    what = f"Skipped a damaged image, {count}: {name} ({reason})."
                    warnings.warn(what, stacklevel=2)
            yield RawBatch(batch.images, batch.labels)


# A `Draw` as numbers, which cross processes without shared memory: rows, and seeds or None.
_PlainDraw = tuple[list[int], list[int] | None]


def _in_numbers(draw: Draw) -> _PlainDraw:
    return draw.rows.tolist(), None if draw.seeds is None else draw.seeds.tolist()


class _DecodedBatch(NamedTuple):
    images: Tensor
    labels: Tensor
    damaged: dict[str, str]  # why, by name


@dataclass
class _Reader(Dataset[_DecodedBatch | InputError]):
    """Reads a batch at once; returns an InputError, which thus crosses processes."""

    images: EncodedImages
    transform: Transform
    skips_damaged: bool

    def __getitem__(self, draw: _PlainDraw) -> _DecodedBatch | InputError:
        try:
            return self._read(draw)
        except InputError as error:
            return error

    def _read(self, draw: _PlainDraw) -> _DecodedBatch:
        drawn, given = draw
        seeds = given or [0] * len(drawn)
        damaged: dict[str, str] = {}
        read: dict[int, tuple[Tensor, int]] = {}
        # In the order of the rows, in which the rows of a shard come together.
        for place in sorted(range(len(drawn)), key=drawn.__getitem__):
            row, length = drawn[place], self.images.length
            others = range(row, row + length) if given is not None else (row,)
            rows = (other % length for other in others)
            image = self._read_first(rows, seeds[place], damaged)
            if image is not None:
                read[place] = image
        if not read:
            raise InputError(
                f"no image of a batch can be read, such as {next(iter(damaged))}: replace or "
                "delete them, or use a larger batch."
            )
        images, labels = zip(*(read[place] for place in sorted(read)), strict=True)
        return _DecodedBatch(torch.stack(images), torch.tensor(labels), damaged)

    def _read_first(
        self, rows: Iterable[int], seed: int, damaged: dict[str, str]
    ) -> tuple[Tensor, int] | None:
        """Return the first readable image and its label, and note what is damaged."""
        for row in rows:
            encoded = self.images.fetch(row)
            try:
                image = decode(encoded)
            except DamagedImage as error:
                if not self.skips_damaged:
                    raise
                damaged[encoded.name] = error.reason
            else:
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(seed)
                    return self.transform(image), encoded.label
        return None
