"""The order of the rows of an epoch: any, or one that reads few shards at a time."""

import torch
from torch import Tensor

SHARDS_MIXED = 16  # a thousand images by nm shard's default, of which a batch takes some


def shuffle_rows(length: int, shard_size: int, generator: torch.Generator) -> Tensor:
    """Return the rows 0 … length − 1 in a random order that a reader of shards can keep up with.

    Where rows lie alone (`shard_size` 1) every order is equally likely. Otherwise the shards, runs
    of `shard_size` rows, are shuffled, and then the rows within each `SHARDS_MIXED` successive
    ones, so that a batch takes its rows from at most about that many.
    """
    if shard_size == 1:
        return torch.randperm(length, generator=generator)
    shards = torch.split(torch.arange(length), shard_size)
    order = torch.randperm(len(shards), generator=generator).tolist()
    mixed = [
        torch.cat([shards[shard] for shard in order[first : first + SHARDS_MIXED]])
        for first in range(0, len(order), SHARDS_MIXED)
    ]
    return torch.cat([rows[torch.randperm(len(rows), generator=generator)] for rows in mixed])
