"""A sentence and its translation, and where pairs of them come from."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol


class SentencePair(NamedTuple):
    """A sentence and its translation, as they were written."""

    source: str
    target: str

    def is_empty(self) -> bool:
        """Whether a side holds nothing but white space."""
        return not (self.source.strip() and self.target.strip())


class PairSource(Protocol):
    """Sentence pairs in a fixed order, which can be gone through many times."""

    @property
    def digest(self) -> str:
        """A short text that differs if the pairs are others or in another order."""

    def __iter__(self) -> Iterator[SentencePair]: ...
