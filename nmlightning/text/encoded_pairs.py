"""Sentence pairs as tokens: two flat arrays, and where each sentence begins in them."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nmlightning.text.sentence_pair import SentencePair
from nmlightning.text.special_tokens import BOS, EOS, PAD
from nmlightning.text.tokenizer import JointBPE
from nmlightning.text.translation_batch import TranslationBatch

TooLong = Literal["drop", "truncate"]
LARGEST_SHORT = 2**16  # of a vocabulary whose tokens fit in 16 bits
ENCODED_TOGETHER = 10_000  # sentences that the tokenizer shares out among threads


class EncodedSide(NamedTuple):
    """Sentences as tokens, without BOS and EOS.

    Attributes:
        tokens: of all sentences, one after the other; uint16, or uint32 of a large vocabulary.
        bounds: (P + 1,) int64: sentence i is tokens[bounds[i]:bounds[i + 1]].
    """

    tokens: NDArray[Any]
    bounds: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(P,) tokens of each sentence."""
        return np.diff(self.bounds)

    def pad(self, rows: NDArray[np.int64], begin: Sequence[int], limit: int | None) -> Tensor:
        """Return sentences as (N, L) int64: `begin`, at most `limit` tokens, EOS, then PAD."""
        first, lengths = self.bounds[rows], self.bounds[rows + 1] - self.bounds[rows]
        if limit is not None:
            lengths = lengths.clip(max=limit)
        column = np.arange(lengths.max(initial=0))
        inside = column < lengths[:, None]
        start = len(begin)
        padded = np.full((len(rows), start + len(column) + 1), PAD, np.int64)
        padded[:, :start] = begin
        padded[:, start:-1][inside] = self.tokens[(first[:, None] + column)[inside]]
        padded[np.arange(len(rows)), start + lengths] = EOS
        return torch.from_numpy(padded)


class Omissions(NamedTuple):
    """What was left out in encoding: pairs with an empty side, and those with one too long."""

    empty: int
    too_long: int

    def describe(self, limits: "TrainingLimits") -> str:
        """Return what was done to how many, in words; nothing where nothing was."""
        done = "left out" if limits.too_long == "drop" else "shortened"
        notes = {
            "with an empty side were left out": self.empty,
            f"of more than {limits.max_length} tokens were {done}": self.too_long,
        }
        return " and ".join(f"{count} {what}" for what, count in notes.items() if count)


class EncodedPairs(NamedTuple):
    """Sentence pairs as tokens.

    Attributes:
        source, target: the sentences and their translations.
        words: (P,) int32: the words of each translation, and one for its end.
        omitted: what these pairs lack, or what was shortened.
        digest: 32 hexadecimal digits of all arrays.
    """

    source: EncodedSide
    target: EncodedSide
    words: NDArray[np.int32]
    omitted: Omissions
    digest: str

    @property
    def length(self) -> int:
        """The number of pairs."""
        return len(self.words)

    def batch(self, rows: Tensor, source_limit: int | None = None) -> TranslationBatch:
        """Return the pairs of some rows (N,); `source_limit` shortens the sources."""
        picked = rows.numpy()
        return TranslationBatch(
            self.source.pad(picked, [], source_limit),
            self.target.pad(picked, [BOS], None),
            torch.from_numpy(self.words[picked].astype(np.int64)),
        )

    def is_intact(self) -> bool:
        """Whether the arrays are those that were digested."""
        return _digest_of(self.source, self.target, self.words) == self.digest

    def padded_lengths(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (P,) the columns that each pair needs in `source` and in `target` of a batch."""
        return self.source.lengths + 1, self.target.lengths + 2


def count_words(text: str) -> int:
    """Return the words of a text, split at white space, and one for its end."""
    return len(text.split()) + 1


class TrainingLimits(NamedTuple):
    """Which pairs are fit to train with: those with something on both sides, and not too much.

    Attributes:
        max_length: tokens of a sentence, without BOS and EOS.
        too_long: what becomes of pairs with more on a side: they are left out (`drop`), or of each
            side the first `max_length` tokens are kept (`truncate`).
    """

    max_length: int
    too_long: TooLong


def encode_pairs(
    pairs: Iterable[SentencePair], tokenizer: JointBPE, limits: TrainingLimits | None = None
) -> EncodedPairs:
    """Return pairs as tokens: all of them as they are, or those that are fit to train with."""
    kind = "H" if tokenizer.vocab_size <= LARGEST_SHORT else "I"
    source, target = _SideWriter(kind), _SideWriter(kind)
    words = array("i")
    empty = too_long = 0
    for chunk in _chunks(pairs):
        kept = [pair for pair in chunk if not (limits and pair.is_empty())]
        empty += len(chunk) - len(kept)
        sides = (tokenizer.encode(side) for side in list(zip(*kept, strict=True)) or [(), ()])
        for pair, ours, theirs in zip(kept, *sides, strict=True):
            longer = limits is not None and max(len(ours), len(theirs)) > limits.max_length
            too_long += longer
            if longer and limits and limits.too_long == "drop":
                continue
            source.append(ours[: limits and limits.max_length])
            target.append(theirs[: limits and limits.max_length])
            words.append(count_words(pair.target))
    columns = source.side(), target.side(), np.asarray(words)
    return EncodedPairs(*columns, Omissions(empty, too_long), _digest_of(*columns))


class _SideWriter:
    def __init__(self, kind: str) -> None:
        self.tokens = array(kind)
        self.bounds = array("q", [0])

    def append(self, tokens: list[int]) -> None:
        self.tokens.extend(tokens)
        self.bounds.append(len(self.tokens))

    def side(self) -> EncodedSide:
        return EncodedSide(np.asarray(self.tokens), np.asarray(self.bounds))


def _chunks(pairs: Iterable[SentencePair]) -> Iterator[list[SentencePair]]:
    rest = iter(pairs)
    while chunk := list(islice(rest, ENCODED_TOGETHER)):
        yield chunk


def _digest_of(source: EncodedSide, target: EncodedSide, words: NDArray[np.int32]) -> str:
    digest = sha256()
    for values in (*source, *target, words):
        digest.update(values.data)
    return digest.hexdigest()[:32]
