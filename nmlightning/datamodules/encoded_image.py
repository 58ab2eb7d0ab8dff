"""An image as it is stored, and how it is decoded."""

import struct
from collections.abc import Iterable
from hashlib import sha256
from io import BytesIO
from typing import NamedTuple, Protocol

from PIL import Image, UnidentifiedImageError

from nmlightning.errors import InputError

# What Pillow raises for damaged files.
DAMAGED = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error),
    Image.DecompressionBombError,
)


# The longer side over the shorter, which evaluation resizes to 256: 2×20,000 pixels would then be
# 256×2,560,000, of 2 GB.
THINNEST = 100


class EncodedImage(NamedTuple):
    """A path or bytes, by the name that an error calls it, and its class."""

    name: str
    file: str | BytesIO
    label: int


class EncodedImages(Protocol):
    """A number of stored images."""

    @property
    def length(self) -> int:
        """The number of images."""

    @property
    def shard_size(self) -> int:
        """How many rows lie in one file; 1 where each has its own."""

    @property
    def digest(self) -> str:
        """The `digest_of` the names and labels of all rows."""

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
            _refuse_thin(*opened.size)
            opened.info.pop("transparency", None)  # RGB has none; of a palette's Pillow would warn
            decoded: Image.Image = opened.convert("RGB")
            return decoded
    except UnidentifiedImageError as error:  # its message may hold an address in memory
        raise DamagedImage(image.name, "of no known format") from error
    except DAMAGED as error:
        raise DamagedImage(image.name, str(error)) from error


def _refuse_thin(width: int, height: int) -> None:
    """Raise ValueError, as Pillow does for what is damaged."""
    if max(width, height) > THINNEST * min(width, height):
        raise ValueError(f"{width}×{height}, one side over {THINNEST} times the other")
