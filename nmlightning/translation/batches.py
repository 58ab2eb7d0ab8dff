"""Batches of sentence pairs of about one length, in training and in evaluation, by process."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nmlightning.datamodules.training_batches import WHOLE_SET, OrderState, Shard, epoch_generator
from nmlightning.errors import InputError
from nmlightning.translation.corpus import EncodedPairs, TranslationBatch

DIFFERENCE_STEP = 2  # tokens: of pairs whose sides differ alike, any order is as good

Lengths = NDArray[np.int64]


class BatchPlan:
    """Cuts sentence pairs into batches of N pairs with N · (longest side) <= tokens.

    Pairs are sorted by their longer side L = max(S, T), then by the difference of their sides, up
    and down in turn, and in any order among equals. Where a batch ends follows from the sequence of
    L alone, which is the same in every order: so all epochs have the same number of batches.

    Attributes:
        cells: (P,) float64 whole numbers: what the pairs are sorted by.
        bounds: (batches + 1,): batch i holds the pairs bounds[i] … bounds[i + 1] − 1 of the order.
    """

    cells: Tensor
    bounds: list[int]

    def __init__(self, cells: Tensor, bounds: list[int]) -> None:
        self.cells = cells
        self.bounds = bounds

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def draw(self, generator: torch.Generator) -> list[Tensor]:
        """Return the rows of each batch: equals in a random order, and so the batches."""
        noise = torch.rand(len(self.cells), generator=generator, dtype=torch.float64)
        order = torch.argsort(self.cells + noise, stable=True)
        batches = order.tensor_split(self.bounds[1:-1])
        return [batches[index] for index in torch.randperm(len(self), generator=generator)]


def plan_batches(source: Lengths, target: Lengths, tokens: int) -> BatchPlan:
    """Return how pairs of the padded lengths S and T, each (P,), are cut into batches.

    A pair whose longer side is over `tokens` is a batch of its own.
    """
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
        start = bounds[-1]
        bounds.append(start + max(1, _fitting(lengths[start:], tokens)))
    return bounds


def _fitting(lengths: Lengths, tokens: int) -> int:
    """Return how many of the first make a batch."""
    few = lengths[: tokens // max(1, int(lengths[0]))]  # no more can fit
    sizes = np.arange(1, len(few) + 1) * few
    return int(np.searchsorted(sizes, tokens, side="right"))


class TrainingPairs:
    """Reads batches of encoded pairs.

    Args:
        pairs: what to read.
        pin_memory: whether to hand out page-locked memory, which a CUDA device copies faster.
    """

    def __init__(self, pairs: EncodedPairs, pin_memory: bool = False) -> None:
        self.pairs = pairs
        self.pin_memory = pin_memory

    def batches(self, draws: Iterable[Tensor]) -> Iterator[TranslationBatch]:
        """Yield the batch of each list of rows (N,)."""
        for rows in draws:
            yield _pinned(self.pairs.batch(rows), self.pin_memory)


class ShuffledBatches:
    """The batches of one epoch, drawn from (seed, epoch) and nothing else.

    All ranks draw the same batches (see `BatchPlan`) in the same order, and rank r of W takes the
    batches r, r + W, r + 2W, …: every epoch has as many on each rank. The up to W − 1 batches that
    are left over are dropped, others in each epoch.

    Args:
        pairs: what to draw from.
        tokens_a_batch: at most so many tokens, padding included, on either side of a batch.
        tokenizer: the digest of the pairs' tokenizer.
        seed: 0 or more; the same on every rank.
        shard: this process's part.
        shuffle: False repeats the first epoch (Lightning's `overfit_batches`).

    Raises:
        InputError: if there are fewer batches than ranks.
    """

    follows_from: Mapping[str, str] = MappingProxyType(
        {
            "tokens_a_batch": "tokens a batch",
            "processes": "processes",
            "tokenizer": "as its tokenizer",
            "pairs": "sentence pairs",
        }
    )
    other_data = "of other sentence pairs"

    def __init__(
        self,
        pairs: EncodedPairs,
        tokens_a_batch: int,
        tokenizer: str,
        *,
        seed: int,
        shard: Shard = WHOLE_SET,
        shuffle: bool = True,
    ) -> None:
        self.plan = plan_batches(*pairs.padded_lengths(), tokens_a_batch)
        self.pairs = pairs
        self.tokens_a_batch = tokens_a_batch
        self.tokenizer = tokenizer
        self.seed = seed
        self.shard = shard
        self.shuffle = shuffle
        self.epoch = 0
        if not len(self):
            raise InputError(
                f"{len(self.plan)} batches of {pairs.length} sentence pairs cannot be shared by "
                f"{shard.world_size} processes: use fewer, or a smaller tokens_a_batch."
            )

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next; Lightning does so before each."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.plan) // self.shard.world_size

    def __iter__(self) -> Iterator[Tensor]:
        batches = self.plan.draw(epoch_generator(self.seed, self.epoch if self.shuffle else 0))
        rank, world_size = self.shard
        yield from batches[rank : len(self) * world_size : world_size]

    def state_dict(self) -> OrderState:
        """Return what the batches follow from, besides the epoch."""
        return {
            "seed": self.seed,
            "tokens_a_batch": self.tokens_a_batch,
            "processes": self.shard.world_size,
            "tokenizer": self.tokenizer,
            "pairs": self.pairs.length,
            "digest": self.pairs.digest,
        }


class EvaluationSentences:
    """Iterates over batches of all pairs, each once, also with several processes.

    Sorted by length, the longest first, since padding is slow. All ranks do the same number of
    steps, which collective operations rely on: each step's pairs are dealt out among them. Where
    fewer are left than there are ranks, their last batches have one more than fits.

    Args:
        pairs: all pairs, as they are.
        references: the translations as they were written.
        tokens_a_batch: as for training; a pair that is longer is a batch of its own.
        max_length: tokens of a source; the rest of a longer one is not read.
        shard: this process's part.
        pin_memory: whether to hand out page-locked memory.

    Attributes:
        rows: of each batch the places of its pairs in the file, to put predictions back in order.

    Raises:
        InputError: if there are fewer pairs than ranks.
    """

    def __init__(
        self,
        pairs: EncodedPairs,
        references: Sequence[str],
        tokens_a_batch: int,
        max_length: int,
        shard: Shard = WHOLE_SET,
        pin_memory: bool = False,
    ) -> None:
        if pairs.length < shard.world_size:
            raise InputError(
                f"{pairs.length} sentence pairs cannot be shared by {shard.world_size} processes."
            )
        self.pairs = pairs
        self.references = references
        self.max_length = max_length
        self.pin_memory = pin_memory
        self.rows = _deal_out(pairs, tokens_a_batch, max_length, shard)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[TranslationBatch]:
        for rows in self.rows:
            batch = self.pairs.batch(rows, source_limit=self.max_length)
            references = tuple(self.references[row] for row in rows.tolist())
            yield _pinned(batch._replace(references=references), self.pin_memory)


def _deal_out(
    pairs: EncodedPairs, tokens_a_batch: int, max_length: int, shard: Shard
) -> list[Tensor]:
    """Return the rows of each batch of this process."""
    rank, world_size = shard
    source, target = pairs.padded_lengths()
    lengths = np.maximum(source.clip(max=max_length + 1), target)
    order = np.argsort(lengths, kind="stable")
    left_over = pairs.length % world_size
    steps = order[left_over:].reshape(-1, world_size)  # a pair for each process
    bounds = cut_sorted(lengths[steps[:, -1]], tokens_a_batch)
    batches = np.split(steps[:, rank], bounds[1:-1])
    if rank < left_over:
        batches[0] = np.append(batches[0], order[rank])
    return [torch.from_numpy(batch) for batch in reversed(batches)]


def _pinned(batch: TranslationBatch, pin_memory: bool) -> TranslationBatch:
    if not pin_memory:
        return batch
    source, target, words = (side.pin_memory() for side in batch[:3])
    return batch._replace(source=source, target=target, words=words)
