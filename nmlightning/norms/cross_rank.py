"""What the ranks that share one batch tell each other; without a group nothing is told.

Called inside forward and backward of one autograd function, so none of it is differentiable. Each
function is one collective.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Count = int | Tensor
"""A number of values; a 0-dimensional int64 tensor where ranks share the batch."""


class Share(NamedTuple):
    """How many values a channel has on all ranks, and on the ranks before this one."""

    total: Count
    before: Count = 0
    group: ProcessGroup | None = None


def share_sums(sums: Tensor, own: int, group: ProcessGroup | None) -> tuple[Tensor, Share]:
    """Return the (C,) sums over all ranks, and the share of this one, which has `own` values.

    ValueError, as torch's, if one value is all that the ranks have.
    """
    if group is None:
        return sums, Share(own)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    counts = sums.new_zeros(ranks)
    counts[rank] = own
    told = sum_over_ranks(torch.cat([sums, counts]), group)
    counts = told[-ranks:].long()  # exact up to 2²⁴ values a rank, however many ranks there are
    if own <= 1 and int(counts.sum()) == 1:  # the ranks with more need not wait for their device
        raise ValueError("Expected more than 1 value per channel when training, got 1 on all ranks")
    return told[:-ranks], Share(counts.sum(), counts[:rank].sum(), group)


def sum_over_ranks(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the sum of every rank's `values`, the same tensor on all of them."""
    if group is None:
        return values
    total = values.clone()
    dist.all_reduce(total, group=group)
    return total


def gather_from_ranks(values: Tensor, group: ProcessGroup) -> Tensor:
    """Return every rank's `values` along a new first dimension, in rank order."""
    gathered = values.new_empty(dist.get_world_size(group), *values.shape)
    dist.all_gather(list(gathered.unbind()), values.contiguous(), group=group)
    return gathered


def keep_largest_of_ranks(
    values: Tensor, group: ProcessGroup | None
) -> tuple[Tensor, Tensor | None]:
    """Return the k largest of all ranks' (C, k) `values`, and which of this rank's are among them.

    Among equal values the lowest rank comes first, then the order within a rank, so that N ranks
    choose what one process chooses on their batches concatenated in rank order.

    Returns:
        (C, k) values, largest first; (C, k) bool, or None without a group (all of them).
    """
    if group is None:
        return values, None
    k = values.shape[1]
    candidates = gather_from_ranks(values, group).transpose(0, 1).flatten(1)
    best, index = torch.sort(candidates, dim=1, descending=True, stable=True)
    mine = index[:, :k] // k == dist.get_rank(group)
    own = torch.zeros_like(values, dtype=torch.int64)
    own.scatter_add_(1, index[:, :k] % k, mine.long())
    return best[:, :k], own > 0


def keep_first_largest(values: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor | None]:
    """Return the elementwise maximum of all ranks' `values`, and where this rank's is the first.

    Returns:
        like `values`; bool like `values`, or None without a group (everywhere).
    """
    if group is None:
        return values, None
    gathered = gather_from_ranks(values, group)
    largest = gathered.amax(0)
    ranks = torch.arange(len(gathered), device=values.device).view(-1, *[1] * values.dim())
    first = torch.where(gathered == largest, ranks, len(gathered)).amin(0)
    return largest, first == dist.get_rank(group)
