"""Training batches of sentence pairs that are read as they arrive."""

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple

from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from nmlightning.datamodules.training_batches import (
    WHOLE_SET,
    OrderState,
    Shard,
    epoch_generator,
    refuse_another_order,
)
from nmlightning.errors import InputError
from nmlightning.translation.batches import TrainingPairs, plan_batches
from nmlightning.translation.corpus import (
    EncodedPairs,
    TrainingLimits,
    TranslationBatch,
    encode_pairs,
)
from nmlightning.translation.sources import SentencePair, StreamedPairs
from nmlightning.translation.tokenizer import JointBPE

REMEMBERED = 4  # pools: Lightning reads a batch or two ahead of those that are done
BEGINNING = "null"


class Pool(NamedTuple):
    """Where a pool began: its number, the epoch's batches before it, the stream's state as JSON."""

    number: int
    batches_before: int
    stream: str


class StreamedBatches:
    """Iterates over batches of a stream, in pools of pairs that are encoded and batched together.

    Pools come in the order of the stream, the same in every epoch. The order within a pool follows
    from (seed, epoch, pool). All ranks read the whole stream, and rank r of W takes the batches
    r, r + W, … of each pool; the up to W − 1 that are left over are dropped.

    How many batches there are is not known beforehand, so there is no `len`: Lightning needs
    `max_steps` for a schedule that depends on the length of the run.

    A run resumed within an epoch begins with the pool in which it stopped, not with the stream.

    Args:
        pairs: the stream.
        tokenizer: of both sides.
        limits: which pairs are fit to train with.
        tokens_a_batch: at most so many tokens, padding included, on either side of a batch.
        pool: pairs that are read and sorted together.
        seed: 0 or more; the same on every rank.
        shard: this process's part.
        shuffle: False repeats the order of the first epoch (Lightning's `overfit_batches`).
        pin_memory: whether to hand out page-locked memory.
        batches_done: how many batches of an unfinished epoch were trained on.
        interrupted: the `state_dict` of the run that is resumed, if any.

    Raises:
        InputError: in resuming within an epoch with other data or batches; in iterating, if no pool
            has a batch for each process.
    """

    follows_from: Mapping[str, str] = MappingProxyType(
        {
            "tokens_a_batch": "tokens a batch",
            "pool": "pairs a pool",
            "max_length": "tokens a sentence at most",
            "too_long": "as what becomes of longer ones",
            "processes": "processes",
            "tokenizer": "as its tokenizer",
        }
    )
    other_data = "of other sentence pairs"

    def __init__(
        self,
        pairs: StreamedPairs,
        tokenizer: JointBPE,
        limits: TrainingLimits,
        tokens_a_batch: int,
        pool: int,
        *,
        seed: int,
        shard: Shard = WHOLE_SET,
        shuffle: bool = True,
        pin_memory: bool = False,
        batches_done: Callable[[], int] = int,
        interrupted: Mapping[str, int | str] | None = None,
    ) -> None:
        self.pairs = pairs
        self.tokenizer = tokenizer
        self.limits = limits
        self.tokens_a_batch = tokens_a_batch
        self.pool = pool
        self.seed = seed
        self.shard = shard
        self.shuffle = shuffle
        self.pin_memory = pin_memory
        self.batches_done = batches_done
        self.interrupted = interrupted
        self.epoch = 0
        self._begun: deque[Pool] = deque(maxlen=REMEMBERED)
        self._skip = 0  # batches, in the next epoch alone
        self._told = False

    @property
    def sampler(self) -> "StreamedBatches":
        """What Lightning tells the epoch to."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next; Lightning does so before each."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[TranslationBatch]:
        done, self._skip = self._skip, 0
        epoch = self.epoch if self.shuffle else 0
        begin = _last_before(done, self.interrupted or {})
        self._begun.clear()
        yield from islice(self._read(begin, epoch), done - begin.batches_before, None)

    def _read(self, pool: Pool, epoch: int) -> Iterator[TranslationBatch]:
        """Yield the batches from the beginning of a pool on."""
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
    ) -> Iterator[TranslationBatch]:
        encoded = encode_pairs(few, self.tokenizer, self.limits)
        self._tell_omissions(encoded)
        plan = plan_batches(*encoded.padded_lengths(), self.tokens_a_batch)
        rows = plan.draw(epoch_generator(self.seed, epoch, number))
        rank, world_size = self.shard
        whole = len(rows) // world_size * world_size
        return TrainingPairs(encoded, self.pin_memory).batches(rows[rank:whole:world_size])

    def _tell_omissions(self, encoded: EncodedPairs) -> None:
        """Warn once, of the first pool that lacks something."""
        told = encoded.omitted.describe(self.limits)
        if told and not self._told:
            self._told = True
            rank_zero_warn(f"Of {self.pool} pairs of the stream {told}, and more may follow.")

    def state_dict(self) -> OrderState:
        """Return what the batches follow from, besides the epoch, and where pools began.

        Lightning calls it for the data module and for the loader.
        """
        return {
            "seed": self.seed,
            "tokens_a_batch": self.tokens_a_batch,
            "pool": self.pool,
            "max_length": self.limits.max_length,
            "too_long": self.limits.too_long,
            "processes": self.shard.world_size,
            "tokenizer": self.tokenizer.digest,
            "digest": self.pairs.digest,
            "epoch": self.epoch,
            "begun": json.dumps(list(self._begun)),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._skip = self.batches_done()
        if self._skip:
            refuse_another_order(self, self.interrupted or {})


def _last_before(done: int, state: Mapping[str, int | str]) -> Pool:
    """Return the pool to which the batch behind those that are `done` belongs."""
    begun = [Pool(*pool) for pool in json.loads(str(state.get("begun", "[]")))]
    first = Pool(0, 0, BEGINNING)
    return [first, *(pool for pool in begun if pool.batches_before <= done)][-1]
