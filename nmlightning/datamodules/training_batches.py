"""Training batches in an order that follows from a seed, by process, and resumed from checkpoints.

The loaders are plain iterables and shard themselves, so Lightning neither replaces their sampler
nor asks for workers.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch

from nmlightning.errors import InputError

OrderState = dict[str, int | str]


class ResumableOrder:
    """An order of batches that a resumed run may take over."""

    seed: int
    epoch: int

    def terms(self) -> Mapping[str, tuple[int | str, str]]:
        """Return what must not change within an epoch, by its key in the state, and in words.

        Those of the `digest` say what another one means.
        """
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Set the next epoch; Lightning does so before each."""
        self.epoch = epoch

    def state_dict(self) -> OrderState:
        """Return what determines the batches, but for the epoch."""
        return {"seed": self.seed, **{key: value for key, (value, _) in self.terms().items()}}


class EpochOrder(ResumableOrder):
    """The content of each batch of an epoch, on this process."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError


@dataclass(eq=False)
class TrainingBatches:
    """Iterates over training batches; a run resumed within an epoch resumes that epoch.

    `data.batches` reads those that the sampler draws. Lightning calls `load_state_dict` where a run
    is resumed, before it reads anything. The epoch then starts after the `batches_done` that
    Lightning has counted, not after those that were read: the batch during which a run was
    interrupted was read but not trained on. The order must be that of the run that was
    `interrupted`, as its sampler's state says.
    """

    data: Any
    sampler: EpochOrder
    batches_done: Callable[[], int] = int
    interrupted: Mapping[str, int | str] | None = None
    _skip: int = field(default=0, init=False)  # batches, in the next epoch alone

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        skip, self._skip = self._skip, 0
        yield from self.data.batches(islice(self.sampler, skip, None))

    def state_dict(self) -> dict[str, Any]:
        return {}  # the batches done are in the checkpoint already

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._skip = self.batches_done()
        if self._skip:
            refuse_another_order(self.sampler, self.interrupted or {})


def refuse_another_order(order: ResumableOrder, theirs: Mapping[str, int | str]) -> None:
    """Raise InputError if the state `theirs` of another run's order means other batches."""
    for key, (ours, what) in order.terms().items():
        if theirs.get(key, ours) != ours:
            both = f"with {theirs[key]} {what}, and this run has {ours}"
            raise InputError(
                f"The checkpoint was written within an epoch {what if key == 'digest' else both}, "
                "so the rest of that epoch is not known: resume with the same data and batch, or "
                "from a checkpoint at the end of an epoch."
            )


def count_batches_done(trainer: pl.Trainer | None) -> int:
    """Return the batches of a resumed epoch that were trained on; 0 where it was finished."""
    if trainer is None or _epoch_is_finished(trainer):
        return 0
    current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(current.processed)


def epoch_generator(seed: int, *place: int) -> torch.Generator:
    """Mix seed and place, the epoch first, so that (1, 0) and (0, 1) have nothing in common."""
    (mixed,) = np.random.SeedSequence((seed, *place)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed))


def find_epoch(trainer: pl.Trainer | None, interrupted: Mapping[str, int | str] | None) -> int:
    """Return the first epoch, which a trainer that resumes knows only later."""
    if trainer is None:
        return 0
    if interrupted is None:
        return trainer.current_epoch
    return int(interrupted.get("epoch", 0)) + _epoch_is_finished(trainer)


def _epoch_is_finished(trainer: pl.Trainer) -> bool:
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    return bool(progress.is_last_batch and progress.current.processed == progress.current.ready)


class Shard(NamedTuple):
    """The part of every epoch that this process reads."""

    rank: int = 0
    world_size: int = 1


WHOLE_SET = Shard()


def shard_of(trainer: pl.Trainer | None) -> Shard:
    """Return this process's part under a trainer; everything without one."""
    ranks = trainer.distributed_sampler_kwargs if trainer else None
    return Shard(ranks["rank"], ranks["num_replicas"]) if ranks else WHOLE_SET


class ResumableData(pl.LightningDataModule):
    """A data module with which a run resumes its order, within an epoch at the very next batch.

    Lightning's checkpoint holds how many batches of the epoch are done, and the state of this
    module what determines their order.
    """

    sampler: ResumableOrder | None = None  # of the latest training loader, which each sets
    interrupted: OrderState | None = None  # the state of that of the run that is resumed

    @property
    def pins_memory(self) -> bool:
        """True for batches in page-locked memory, which a CUDA device copies faster."""
        return bool(self.trainer and self.trainer.strategy.root_device.type == "cuda")

    def order_options(self) -> dict[str, Any]:
        """Return `seed`, `shard` and `shuffle` of an order: of the run, or of one it resumes."""
        trainer = self.trainer
        seed = int((self.interrupted or {}).get("seed", torch.initial_seed()))
        return {
            "seed": int(trainer.strategy.broadcast(seed)) if trainer else seed,  # that of rank 0
            "shard": shard_of(trainer),
            "shuffle": not getattr(trainer, "overfit_batches", 0),
        }

    def batches_done(self) -> int:
        """Return the batches of a resumed epoch that were trained on; 0 where it was finished."""
        return count_batches_done(self.trainer)

    def load(self, data: Any, sampler: EpochOrder) -> TrainingBatches:
        """Return the training loader of data whose batches the sampler draws."""
        self.sampler = sampler
        return TrainingBatches(data, sampler, self.batches_done, self.interrupted)

    def state_dict(self) -> OrderState:
        """Return the seed of the order, the digest of the data and the sizes of batches."""
        return self.sampler.state_dict() if self.sampler else {}

    def load_state_dict(self, state_dict: OrderState) -> None:
        """Let the next training loader resume the order of the run that was interrupted."""
        self.interrupted = dict(state_dict)

    def teardown(self, stage: str) -> None:
        self.interrupted = None  # the next run may be another
