"""Which part of the data a process reads."""

from typing import NamedTuple

import pytorch_lightning as pl


class Shard(NamedTuple):
    """Which part of every epoch this process reads."""

    rank: int = 0
    world_size: int = 1


WHOLE_SET = Shard()


def shard_of(trainer: pl.Trainer | None) -> Shard:
    """Return this process's part under a trainer; everything without one."""
    ranks = trainer.distributed_sampler_kwargs if trainer else None
    return Shard(ranks["rank"], ranks["num_replicas"]) if ranks else WHOLE_SET
