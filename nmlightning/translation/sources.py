"""Sources of sentence pairs: text files, Hugging Face's `datasets`, and names of numbers."""

import gzip
import zlib
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import cached_property
from hashlib import sha256
from importlib import import_module
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch

from nmlightning.errors import InputError


class SentencePair(NamedTuple):
    """A sentence and its translation, as they were written."""

    source: str
    target: str

    def is_empty(self) -> bool:
        return not (self.source.strip() and self.target.strip())


class PairSource(Protocol):
    """Sentence pairs in a fixed order, which can be gone through many times."""

    @property
    def digest(self) -> str:
        """A short text that differs if the pairs are others or in another order."""

    def __iter__(self) -> Iterator[SentencePair]: ...


TEXT_PACKAGES = ("datasets", "num2words", "sacrebleu", "tokenizers")  # the extra text


def import_text_package(name: str) -> Any:
    """Return the package `name`, or raise InputError that says what to install."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # something is wrong with the package itself
            raise
        raise InputError(
            f"this needs the package {name}: pip install {' '.join(TEXT_PACKAGES)}."
        ) from error


UNREACHABLE = (OSError, ValueError)  # no network, no such data set, no such configuration


def open_split(
    dataset: str, pair: tuple[str, str], split: str, folder: Path, *, streaming: bool
) -> Any:
    """Return a split of a data set on the Hub, or in a folder: from disk, downloaded or streamed.

    The configuration is named by the pair of languages; `datasets` keeps downloads in `folder`.
    """
    datasets = import_text_package("datasets")
    configuration = "-".join(pair)
    try:
        return datasets.load_dataset(
            dataset, configuration, split=split, cache_dir=str(folder), streaming=streaming
        )
    except UNREACHABLE as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{dataset} ({configuration}, {split}) is not in {folder} and cannot be loaded "
            f"({reason}): connect to the network, name the folder of a copy as dataset, or train "
            "on ParallelText, or on NumberNames, which needs no download."
        ) from error


class StoredPairs:
    """The pairs of a split on disk."""

    def __init__(self, split: Any, pair: tuple[str, str]) -> None:
        self.split, self.pair = split, pair

    @property
    def digest(self) -> str:
        """Of the names of the files, which `datasets` derives from what they were made of."""
        files = [Path(file["filename"]).parts[-4:] for file in self.split.cache_files]
        return sha256(repr((self.split.num_rows, files)).encode()).hexdigest()[:32]

    def __iter__(self) -> Iterator[SentencePair]:
        return _read(self.split, self.pair)


class StreamedPairs:
    """The `first` pairs, or all, of an `IterableDataset`, from where the state says on."""

    def __init__(self, split: Any, pair: tuple[str, str], first: int | None = None) -> None:
        self.split, self.pair, self.first = split, pair, first
        self.beginning = deepcopy(split.state_dict())

    @property
    def digest(self) -> str:
        """Of what the data set says of itself, since its pairs are not at hand."""
        info = self.split.info
        parts = {name: part.num_examples for name, part in (info.splits or {}).items()}
        facts = (info.dataset_name, info.config_name, info.dataset_size, parts, self.first)
        return sha256(repr((facts, self.pair)).encode()).hexdigest()[:32]

    def state_dict(self) -> dict[str, Any]:
        """Return how far the pairs were read."""
        return deepcopy(self.split.state_dict())

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Let the next iteration resume from a state; None is the beginning."""
        self.split.load_state_dict(deepcopy(self.beginning if state is None else state))

    def __iter__(self) -> Iterator[SentencePair]:
        return islice(_read(self.split, self.pair), self.first)


def _read(split: Any, pair: tuple[str, str]) -> Iterator[SentencePair]:
    source, target = pair
    for row in split:
        translation = row["translation"]
        yield SentencePair(translation[source], translation[target])


GZIP = b"\x1f\x8b"
BLOCK = 2**20
BYTE_ORDER_MARK = "\ufeff"


class ParallelFiles:
    """The pairs of two UTF-8 files, plain or gzipped, as their first bytes say.

    A line ends with \\n or \\r\\n and with nothing else, such as U+2028. A byte order mark is left
    out.
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
    """Yield the lines of a UTF-8 file, plain or gzipped, without their ends."""
    number = 0
    try:
        with path.open("rb") as file:
            gzipped = file.read(len(GZIP)) == GZIP
        with gzip.open(path) if gzipped else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield decode_line(line, number, str(path))
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{path} cannot be read after line {number} ({error}): copy it again."
        ) from error


def decode_line(line: bytes, number: int, name: str) -> str:
    """Return a line of UTF-8 without its end, the first, of number 1, without a byte order mark."""
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


def _digest_of(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()[:32]


DIGITS = range(3, 7)  # of the numbers that are drawn; those below 100 are all trained on
SEED = 0
_SPELLING = 2  # of the names, counted up with each change, so that no cache serves the former


class NamedNumbers:
    """The German and English names of numbers below a million: of 21 einundzwanzig, twenty-one."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = numbers

    @property
    def digest(self) -> str:
        return sha256(repr((_SPELLING, *self.numbers)).encode()).hexdigest()[:32]

    def __iter__(self) -> Iterator[SentencePair]:
        return iter(self._pairs)

    @cached_property
    def _pairs(self) -> list[SentencePair]:
        name = import_text_package("num2words").num2words  # 0.2 ms a name
        # num2words 0.5.14 spells 101,000 "einhunderteinstausend", and so each …01,….
        german = (name(n, lang="de").replace("einstausend", "eintausend") for n in self.numbers)
        return [
            SentencePair(de, name(n, lang="en")) for n, de in zip(self.numbers, german, strict=True)
        ]


def split_numbers(training: int, held_out: int) -> tuple[list[int], list[int], list[int]]:
    """Return numbers to train, to validate and to test with, none of them in two parts.

    Those from 0 to 99 are trained on, besides `training` others; validation and test have
    `held_out` each. Of the numbers of 3, 4, 5 and 6 digits there are equally many, or all that
    there are. Always the same.
    """
    parts: tuple[list[int], list[int], list[int]] = list(range(100)), [], []
    generator = torch.Generator().manual_seed(SEED)
    each = held_out // len(DIGITS)
    for digits in DIGITS:
        first = 10 ** (digits - 1)
        drawn = (first + torch.randperm(9 * first, generator=generator)).tolist()
        parts[2].extend(drawn[:each])
        parts[1].extend(drawn[each : 2 * each])
        rest = drawn[2 * each :]
        due = training // (DIGITS.stop - digits)  # an equal part of what is still to be found
        parts[0].extend(rest[:due])
        training -= len(rest[:due])
    return parts
