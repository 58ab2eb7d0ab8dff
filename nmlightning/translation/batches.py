"""Batches of sentence pairs of about one length, by process: shuffled, streamed, in evaluation."""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import islice, starmap
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from nmlightning.datamodules import training_batches
from nmlightning.errors import InputError
from nmlightning.translation import corpus
from nmlightning.translation.sources import SentencePair, StreamedPairs
from nmlightning.translation.tokenizer import JointBPE

DIFFERENCE_STEP = 2  # tokens; pairs whose differences are within a step are in any order

Lengths = NDArray[np.int64]


@dataclass(frozen=True)
class BatchPlan:
    """Cuts sentence pairs into batches of N pairs with N · (longest side) <= tokens.

    Pairs are sorted by their longer side L = max(S, T), then by the difference of their sides, up
    and down in turn, and in any order among equals. Where a batch ends follows from the sequence of
    L alone, which is the same in every order: so all epochs have the same number of batches.
    """

    cells: Tensor  # (P,) float64 whole numbers, the sort keys of the pairs
    bounds: list[int]  # batch i holds the pairs bounds[i] … bounds[i + 1] − 1 of the order

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def draw(self, generator: torch.Generator) -> list[Tensor]:
        """Return the rows of each batch; equals and batches are in a random order."""
        noise = torch.rand(len(self.cells), generator=generator, dtype=torch.float64)
        order = torch.argsort(self.cells + noise, stable=True)
        batches = order.tensor_split(self.bounds[1:-1])
        return [batches[index] for index in torch.randperm(len(self), generator=generator)]


def plan_batches(source: Lengths, target: Lengths, tokens: int) -> BatchPlan:
    """Return the plan for pairs of padded lengths (P,) S and T; one of over `tokens` is alone."""
    longest = np.maximum(source, target)
    difference = (target - source) // DIFFERENCE_STEP
    turning = np.where(longest % 2, difference, -difference)
    span = 2 * int(np.abs(difference).max(initial=0)) + 1
    cells = torch.from_numpy((longest * span + turning).astype(np.float64))
    bounds = cut_sorted(np.sort(longest), tokens)
    return BatchPlan(cells, bounds)


def cut_sorted(lengths: Lengths, tokens: int) -> list[int]:
    """Return 0 and where each batch ends, for ascending lengths: N · (its last) <= tokens."""
    bounds = [0]
    while bounds[-1] < len(lengths):
        rest = lengths[bounds[-1] :]
        few = rest[: tokens // max(1, int(rest[0]))]  # no more can fit
        sizes = np.arange(1, len(few) + 1) * few
        fitting = int(np.searchsorted(sizes, tokens, side="right"))
        bounds.append(bounds[-1] + max(1, fitting))
    return bounds


@dataclass(frozen=True)
class TrainingPairs:
    """Reads batches of encoded pairs, into page-locked memory for a CUDA device (`pin_memory`)."""

    pairs: corpus.EncodedPairs
    pin_memory: bool = False

    def batches(self, draws: Iterable[Tensor]) -> Iterator[corpus.TranslationBatch]:
        for rows in draws:
            yield _pinned(self.pairs.batch(rows), self.pin_memory)


@dataclass(eq=False)
class ShuffledBatches(training_batches.EpochOrder):
    """The batches of one epoch, drawn from (seed, epoch) and nothing else.

    All ranks draw the same batches (see `BatchPlan`) in the same order, and rank r of W takes the
    batches r, r + W, r + 2W, …: every epoch has as many on each rank. The up to W − 1 batches that
    are left over are dropped, others in each epoch.

    Neither side of a batch has more than `tokens_a_batch`, padding included. `tokenizer` is the
    digest of the pairs' own, and `shuffle` = False repeats the first epoch (Lightning's
    `overfit_batches`).
    """

    pairs: corpus.EncodedPairs
    tokens_a_batch: int
    tokenizer: str
    _: KW_ONLY
    seed: int
    shard: training_batches.Shard = training_batches.WHOLE_SET
    shuffle: bool = True
    epoch: int = 0

    def __post_init__(self) -> None:
        self.plan = plan_batches(*self.pairs.padded_lengths(), self.tokens_a_batch)
        if not len(self):
            raise InputError(
                f"{len(self.plan)} batches of {self.pairs.length} sentence pairs cannot be shared "
                f"by {self.shard.world_size} processes: use fewer, or a smaller tokens_a_batch."
            )

    def __len__(self) -> int:
        return len(self.plan) // self.shard.world_size

    def __iter__(self) -> Iterator[Tensor]:
        batches = self.plan.draw(
            training_batches.epoch_generator(self.seed, self.epoch if self.shuffle else 0)
        )
        rank, world_size = self.shard
        yield from batches[rank : len(self) * world_size : world_size]

    def terms(self) -> dict[str, tuple[int | str, str]]:
        return {
            "tokens_a_batch": (self.tokens_a_batch, "tokens a batch"),
            "processes": (self.shard.world_size, "processes"),
            "tokenizer": (self.tokenizer, "as its tokenizer"),
            "pairs": (self.pairs.length, "sentence pairs"),
            "digest": (self.pairs.digest, "of other sentence pairs"),
        }


REMEMBERED = 4  # pools: Lightning reads a batch or two ahead of those that are done
BEGINNING = "null"


class Pool(NamedTuple):
    """The start of a pool: its number, the epoch's batches before it, the stream's state (JSON)."""

    number: int
    batches_before: int
    stream: str


@dataclass(eq=False)
class StreamedBatches(training_batches.ResumableOrder):
    """Iterates over batches of a stream, in pools of pairs that are encoded and batched together.

    Pools come in the order of the stream, the same in every epoch. The order within a pool follows
    from (seed, epoch, pool). All ranks read the whole stream, and rank r of W takes the batches r,
    r + W, … of each pool; the up to W − 1 that are left over are dropped. There is no `len`, so
    Lightning needs `max_steps` for a schedule that depends on the length of the run.

    A run resumed within an epoch begins with the pool in which it stopped, not with the stream. The
    other arguments are those of `ShuffledBatches` and `TrainingBatches`.
    """

    pairs: StreamedPairs
    tokenizer: JointBPE
    limits: corpus.TrainingLimits
    tokens_a_batch: int
    pool: int
    _: KW_ONLY
    seed: int
    shard: training_batches.Shard = training_batches.WHOLE_SET
    shuffle: bool = True
    pin_memory: bool = False
    batches_done: Callable[[], int] = int
    interrupted: Mapping[str, int | str] | None = None
    epoch: int = 0

    def __post_init__(self) -> None:
        self._begun: deque[Pool] = deque(maxlen=REMEMBERED)
        self._skip = 0  # batches, in the next epoch alone
        self._has_warned = False

    @property
    def sampler(self) -> "StreamedBatches":
        """The object whose `set_epoch` Lightning calls."""
        return self

    def terms(self) -> dict[str, tuple[int | str, str]]:
        return {
            "tokens_a_batch": (self.tokens_a_batch, "tokens a batch"),
            "pool": (self.pool, "pairs a pool"),
            "max_length": (self.limits.max_length, "tokens a sentence at most"),
            "too_long": (self.limits.too_long, "as what becomes of longer ones"),
            "processes": (self.shard.world_size, "processes"),
            "tokenizer": (self.tokenizer.digest, "as its tokenizer"),
            "digest": (self.pairs.digest, "of other sentence pairs"),
        }

    def __iter__(self) -> Iterator[corpus.TranslationBatch]:
        done, self._skip = self._skip, 0
        epoch = self.epoch if self.shuffle else 0
        pools = json.loads(str((self.interrupted or {}).get("begun", "[]")))
        before = [pool for pool in starmap(Pool, pools) if pool.batches_before <= done]
        begin = before[-1] if before else Pool(0, 0, BEGINNING)
        self._begun.clear()
        yield from islice(self._read(begin, epoch), done - begin.batches_before, None)

    def _read(self, pool: Pool, epoch: int) -> Iterator[corpus.TranslationBatch]:
        """Yield the batches from a pool on."""
        self.pairs.load_state_dict(json.loads(pool.stream))
        stream = iter(self.pairs)
        while few := list(islice(stream, self.pool)):
            self._begun.append(pool)
            number, before, _ = pool
            for batch in self._batches(few, epoch, number):
                before += 1
                yield batch
            pool = Pool(number + 1, before, json.dumps(self.pairs.state_dict()))
        if not pool.batches_before:
            raise InputError(
                f"no {self.pool} sentence pairs of the stream make a batch for each of "
                f"{self.shard.world_size} processes: use a larger pool or a smaller tokens_a_batch."
            )

    def _batches(
        self, few: list[SentencePair], epoch: int, number: int
    ) -> Iterator[corpus.TranslationBatch]:
        encoded = corpus.encode_pairs(few, self.tokenizer, self.limits)
        if not self._has_warned and (omitted := encoded.omitted.describe(self.limits)):
            self._has_warned = True
            rank_zero_warn(f"Of {self.pool} pairs of the stream {omitted}, and more may follow.")
        plan = plan_batches(*encoded.padded_lengths(), self.tokens_a_batch)
        rows = plan.draw(training_batches.epoch_generator(self.seed, epoch, number))
        rank, world_size = self.shard
        whole = len(rows) // world_size * world_size
        return TrainingPairs(encoded, self.pin_memory).batches(rows[rank:whole:world_size])

    def state_dict(self) -> training_batches.OrderState:
        """Return what determines the batches, and where pools began."""
        place: training_batches.OrderState = {
            "epoch": self.epoch,
            "begun": json.dumps(list(self._begun)),
        }
        return super().state_dict() | place

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._skip = self.batches_done()
        if self._skip:
            training_batches.refuse_another_order(self, self.interrupted or {})


@dataclass(eq=False)
class EvaluationSentences:
    """Iterates over batches of all pairs, each once, also with several processes.

    Sorted by length, the longest first, since padding is slow. All ranks do the same number of
    steps, which collective operations rely on; to that end some batches may have a pair too many.
    Of a source longer than `max_length` the rest is not read, and a pair longer than
    `tokens_a_batch` is a batch of its own. `rows` are those of each batch's pairs in the file, to
    put predictions back in order.
    """

    pairs: corpus.EncodedPairs
    references: Sequence[str]
    tokens_a_batch: int
    max_length: int
    shard: training_batches.Shard = training_batches.WHOLE_SET
    pin_memory: bool = False

    def __post_init__(self) -> None:
        pairs, (rank, world_size) = self.pairs.length, self.shard
        if pairs < world_size:
            raise InputError(f"{pairs} sentence pairs cannot be shared by {world_size} processes.")
        source, target = self.pairs.padded_lengths()
        lengths = np.maximum(source.clip(max=self.max_length + 1), target)
        order = np.argsort(lengths, kind="stable")
        left_over = pairs % world_size
        steps = order[left_over:].reshape(-1, world_size)  # a pair for each process
        bounds = cut_sorted(lengths[steps[:, -1]], self.tokens_a_batch)
        batches = np.split(steps[:, rank], bounds[1:-1])
        if rank < left_over:
            batches[0] = np.append(batches[0], order[rank])
        self.rows = [torch.from_numpy(batch) for batch in reversed(batches)]  # of each batch

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[corpus.TranslationBatch]:
        for rows in self.rows:
            batch = self.pairs.batch(rows, source_limit=self.max_length)
            references = tuple(self.references[row] for row in rows.tolist())
            yield _pinned(batch._replace(references=references), self.pin_memory)


def _pinned(batch: corpus.TranslationBatch, pin_memory: bool) -> corpus.TranslationBatch:
    if not pin_memory:
        return batch
    source, target, words = (side.pin_memory() for side in batch[:3])
    return batch._replace(source=source, target=target, words=words)
