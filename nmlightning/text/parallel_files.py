"""Two text files, one sentence a line, of which one is the translation of the other."""

import gzip
import zlib
from collections.abc import Iterator
from functools import cached_property
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO, cast

from nmlightning.errors import InputError
from nmlightning.text.sentence_pair import SentencePair

GZIP = b"\x1f\x8b"
BLOCK = 2**20
BYTE_ORDER_MARK = "\ufeff"


class ParallelFiles:
    """The pairs of two UTF-8 files, plain or gzipped, which is told by their first bytes.

    A line ends with \\n or \\r\\n and with nothing else, such as U+2028. A byte order mark is left
    out.

    Args:
        source: the file of the sentences.
        target: the file of their translations, line by line.

    Raises:
        InputError: if a file is absent; in iterating, if one is damaged, not UTF-8 or empty, or if
            one has more lines than the other.
    """

    def __init__(self, source: str | Path, target: str | Path) -> None:
        self.source, self.target = _find_file(source), _find_file(target)

    @cached_property
    def digest(self) -> str:
        return "-".join(_digest_of(path) for path in (self.source, self.target))

    def __iter__(self) -> Iterator[SentencePair]:
        lengths = [0, 0]
        for pair in zip_longest(read_lines(self.source), read_lines(self.target)):
            for side, sentence in enumerate(pair):
                lengths[side] += sentence is not None
            if None not in pair:
                yield SentencePair(*cast(tuple[str, str], pair))
        if lengths[0] != lengths[1]:
            raise InputError(
                f"{self.source} has {lengths[0]} lines and {self.target} {lengths[1]}, so they do "
                "not belong together: give files with a translation in each line."
            )
        if lengths == [0, 0]:
            raise InputError(f"{self.source} and {self.target} are empty: give other files.")


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file, plain or gzipped, without their ends.

    Raises:
        InputError: if the file cannot be read, is cut off or damaged, or not UTF-8.
    """
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                yield decode_line(line, number, str(path))
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{path} cannot be read after line {number} ({error}): copy it again."
        ) from error


def decode_line(line: bytes, number: int, name: str) -> str:
    """Return a line of UTF-8 without its end, the first without a byte order mark.

    Args:
        line: up to its \\n, if it has one.
        number: of the line, from 1.
        name: of what it is read from, for the error.

    Raises:
        InputError: it is not UTF-8.
    """
    try:
        text = line.removesuffix(b"\n").removesuffix(b"\r").decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}, line {number}: byte {error.start + 1} is not UTF-8 ({error.reason}): convert "
            "the text, or correct the line."
        ) from error
    return text.removeprefix(BYTE_ORDER_MARK) if number == 1 else text


def _find_file(path: str | Path) -> Path:
    found = Path(path).expanduser().absolute()
    if not found.is_file():
        raise InputError(f"there is no file {found}: give one with a sentence in each line.")
    return found


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        gzipped = file.read(len(GZIP)) == GZIP
    return cast(BinaryIO, gzip.open(path)) if gzipped else path.open("rb")


def _digest_of(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()[:32]
