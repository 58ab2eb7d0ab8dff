"""Sentence pairs in data sets of Hugging Face's `datasets`, on disk or streamed."""

from collections.abc import Iterator
from copy import deepcopy
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from nmlightning.errors import InputError
from nmlightning.text.sentence_pair import SentencePair
from nmlightning.text.text_packages import import_text_package

UNREACHABLE = (OSError, ValueError)  # no network, no such data set, no such configuration


def open_split(
    dataset: str, pair: tuple[str, str], split: str, folder: Path, *, streaming: bool
) -> Any:
    """Return a split, read from disk, where it is downloaded to, or streamed.

    Args:
        dataset: its name on the Hub, or a folder with a copy.
        pair: the languages, source and target; the configuration is named by them.
        split: train, validation or test.
        folder: `datasets` keeps what it downloads there.
        streaming: whether to download nothing beforehand.

    Raises:
        InputError: without the package; if the data set is neither at hand nor reachable.
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
        self.split = split
        self.pair = pair

    @property
    def digest(self) -> str:
        """Of the names of the files, which `datasets` derives from what they were made of."""
        files = [Path(file["filename"]).parts[-4:] for file in self.split.cache_files]
        return sha256(repr((self.split.num_rows, files)).encode()).hexdigest()[:32]

    def __iter__(self) -> Iterator[SentencePair]:
        return _read(self.split, self.pair)


class StreamedPairs:
    """The pairs of a split as they arrive; each iteration goes on where the state says.

    Args:
        split: an `IterableDataset`.
        pair: the languages, source and target.
        first: how many pairs to stop after; None reads all.
    """

    def __init__(self, split: Any, pair: tuple[str, str], first: int | None = None) -> None:
        self.split = split
        self.pair = pair
        self.first = first
        self.beginning = deepcopy(split.state_dict())

    @property
    def digest(self) -> str:
        """Of what the data set says of itself, since its pairs are not at hand."""
        info = self.split.info
        parts = {name: part.num_examples for name, part in (info.splits or {}).items()}
        told = (info.dataset_name, info.config_name, info.dataset_size, parts, self.first)
        return sha256(repr((told, self.pair)).encode()).hexdigest()[:32]

    def state_dict(self) -> dict[str, Any]:
        """Return how far the pairs were read."""
        return deepcopy(self.split.state_dict())

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Let the next iteration go on from a state; None is the beginning."""
        self.split.load_state_dict(deepcopy(self.beginning if state is None else state))

    def __iter__(self) -> Iterator[SentencePair]:
        return islice(_read(self.split, self.pair), self.first)


def _read(split: Any, pair: tuple[str, str]) -> Iterator[SentencePair]:
    source, target = pair
    for row in split:
        translation = row["translation"]
        yield SentencePair(translation[source], translation[target])
