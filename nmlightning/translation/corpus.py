"""Sentence pairs as tokens: encoded once, cached in a file, mapped by every process.

The name of a file is a digest of the pairs and of every option that matters, so other data or
options make another file. Damaged files are written again. Without a folder nothing is cached.
"""

import json
from array import array
from collections.abc import Iterable, Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from nmlightning.atomic_file import replace_file
from nmlightning.errors import InputError
from nmlightning.translation.sources import PairSource, SentencePair
from nmlightning.translation.tokenizer import BOS, EOS, PAD, JointBPE


class TranslationBatch(NamedTuple):
    """Sentence pairs as tokens, padded at the end with `PAD`."""

    source: Tensor  # (N, S) int64: the tokens of each sentence and EOS
    target: Tensor  # (N, T) int64: BOS, the tokens of each translation, and EOS
    words: Tensor  # (N,) int64: of each translation, split at white space, and one for its end
    references: tuple[str, ...] = ()  # the translations as they were written; not in training


TooLong = Literal["drop", "truncate"]
LARGEST_SHORT = 2**16  # of a vocabulary whose tokens fit in 16 bits
ENCODED_TOGETHER = 10_000  # sentences that the tokenizer shares out among threads


class EncodedSide(NamedTuple):
    """Sentences as tokens, without BOS and EOS."""

    tokens: NDArray[Any]  # of all sentences in a row; uint16, or uint32 of a large vocabulary
    bounds: NDArray[np.int64]  # (P + 1,): sentence i is tokens[bounds[i]:bounds[i + 1]]

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
    """The pairs left out in encoding: those with an empty side, and those with one too long."""

    empty: int
    too_long: int

    def describe(self, limits: "TrainingLimits") -> str:
        """Return their numbers in words; an empty text if there are none."""
        done = "left out" if limits.too_long == "drop" else "shortened"
        notes = {
            "with an empty side were left out": self.empty,
            f"of more than {limits.max_length} tokens were {done}": self.too_long,
        }
        return " and ".join(f"{count} {what}" for what, count in notes.items() if count)


class EncodedPairs(NamedTuple):
    """Sentence pairs as tokens."""

    source: EncodedSide
    target: EncodedSide
    words: NDArray[np.int32]  # (P,) of each translation, and one for its end
    omitted: Omissions
    digest: str  # 32 hexadecimal digits of all arrays

    @property
    def length(self) -> int:
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
        """Return True if the arrays are those that were digested."""
        return _digest_of(self.source, self.target, self.words) == self.digest

    def padded_lengths(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (P,) the columns that each pair needs in `source` and in `target` of a batch."""
        return self.source.lengths + 1, self.target.lengths + 2


class TrainingLimits(NamedTuple):
    """Most tokens of a side of a training pair, and whether longer pairs are cut or dropped."""

    max_length: int
    too_long: TooLong


def encode_pairs(
    pairs: Iterable[SentencePair], tokenizer: JointBPE, limits: TrainingLimits | None = None
) -> EncodedPairs:
    """Return pairs as tokens: all of them as they are, or those within the limits."""
    kind = "H" if tokenizer.vocab_size <= LARGEST_SHORT else "I"
    tokens, bounds = (array(kind), array(kind)), (array("q", [0]), array("q", [0]))
    words = array("i")
    empty = too_long = 0
    rest = iter(pairs)
    while chunk := list(islice(rest, ENCODED_TOGETHER)):
        kept = [pair for pair in chunk if not (limits and pair.is_empty())]
        empty += len(chunk) - len(kept)
        sides = (tokenizer.encode(side) for side in list(zip(*kept, strict=True)) or [(), ()])
        for pair, *both in zip(kept, *sides, strict=True):
            longer = limits is not None and max(map(len, both)) > limits.max_length
            too_long += longer
            if longer and limits and limits.too_long == "drop":
                continue
            for all_tokens, ends, side in zip(tokens, bounds, both, strict=True):
                all_tokens.extend(side[: limits and limits.max_length])
                ends.append(len(all_tokens))
            words.append(len(pair.target.split()) + 1)
    arrays = (map(np.asarray, side) for side in zip(tokens, bounds, strict=True))
    source, target = (EncodedSide(*side) for side in arrays)
    columns = source, target, np.asarray(words)
    return EncodedPairs(*columns, Omissions(empty, too_long), _digest_of(*columns))


def _digest_of(source: EncodedSide, target: EncodedSide, words: NDArray[np.int32]) -> str:
    digest = sha256()
    for values in (*source, *target, words):
        digest.update(values.data)
    return digest.hexdigest()[:32]


FORMAT = "nmlightning sentence pairs 1"
SIDES = ("source", "target")


def write_pairs(path: Path, pairs: EncodedPairs) -> None:
    """Write the file at once or not at all, so that a reader never finds half of it."""
    arrays: dict[str, Any] = {"words": pairs.words}
    for name, side in zip(SIDES, (pairs.source, pairs.target), strict=True):
        arrays |= {f"{name}/tokens": side.tokens, f"{name}/bounds": side.bounds}
    metadata = {
        "format": FORMAT,
        "digest": pairs.digest,
        "omitted": json.dumps(pairs.omitted._asdict()),
    }
    with replace_file(path) as file:
        file.write(save(arrays, metadata))


def read_pairs(path: Path) -> EncodedPairs | None:
    """Return the pairs, their tokens in the file until they are used; None if it is damaged.

    This checks the file's length and structure alone; `is_intact` of the pairs reads all.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                return None
            arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
        source, target = (
            EncodedSide(arrays[f"{name}/tokens"], arrays[f"{name}/bounds"]) for name in SIDES
        )
        omitted = Omissions(**json.loads(metadata["omitted"]))
        return EncodedPairs(source, target, arrays["words"], omitted, metadata["digest"])
    except (OSError, SafetensorError, LookupError, ValueError, TypeError, RecursionError):
        return None


def cached_tokenizer(folder: Path | None, pairs: PairSource, vocab_size: int) -> JointBPE:
    """Return the joint tokenizer of both sides of the pairs, trained if it is not cached."""
    path = folder and _cache_path(folder, "tokenizer", ".json", pairs.digest, vocab_size)
    if path and path.is_file():
        try:
            return JointBPE.load(path)
        except InputError:  # damaged
            path.unlink()
    tokenizer = JointBPE.train((sentence for pair in pairs for sentence in pair), vocab_size)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(path)
    return tokenizer


def cached_pairs(
    folder: Path | None,
    pairs: PairSource,
    tokenizer: JointBPE,
    limits: TrainingLimits,
    *,
    check: bool = False,
) -> EncodedPairs:
    """Return the pairs within the limits, encoded if they are not cached in `folder`.

    With `check` all of a cached file is read, to know that it is intact.
    """
    if folder is None:
        return _encode(pairs, tokenizer, limits)
    path = _cache_path(folder, "pairs", ".safetensors", pairs.digest, tokenizer.digest, *limits)
    cached = read_pairs(path)
    if cached and (not check or cached.is_intact()):
        return cached
    folder.mkdir(parents=True, exist_ok=True)
    write_pairs(path, _encode(pairs, tokenizer, limits))
    written = read_pairs(path)
    assert written, f"{path} was written a moment ago"
    return written


def _encode(pairs: PairSource, tokenizer: JointBPE, limits: TrainingLimits) -> EncodedPairs:
    encoded = encode_pairs(pairs, tokenizer, limits)
    if not encoded.length:
        raise InputError(
            f"no sentence pair is left to train with: {encoded.omitted.empty} have an empty side "
            f"and {encoded.omitted.too_long} more than {limits.max_length} tokens; give other data "
            "or a larger max_length."
        )
    return encoded


def _cache_path(folder: Path, stem: str, ending: str, *content: object) -> Path:
    digest = sha256(repr(content).encode()).hexdigest()[:16]
    return folder / f"{stem}-{digest}{ending}"
