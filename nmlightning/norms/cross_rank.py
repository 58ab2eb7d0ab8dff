"""Reductions over the ranks that share one batch; without a group they return what they are given.

They are called inside forward and backward of one autograd function, so none is differentiable.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def sum_over_ranks(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the sum of every rank's `values`, the same tensor on all of them."""
    return _reduce(values, group, "sum")


def count_over_ranks(count: int, like: Tensor, group: ProcessGroup | None) -> int | Tensor:
    """Return the sum of every rank's `count`: 0-dimensional, on the device of `like`."""
    if group is None:
        return count
    return sum_over_ranks(torch.tensor(count, device=like.device), group)


def max_over_ranks(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the elementwise maximum of every rank's `values`."""
    return _reduce(values, group, "max")


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
    gathered = values.new_empty(dist.get_world_size(group), *values.shape)
    dist.all_gather(list(gathered.unbind()), values.contiguous(), group=group)
    candidates = gathered.transpose(0, 1).flatten(1)
    best, index = torch.sort(candidates, dim=1, descending=True, stable=True)
    mine = index[:, :k] // k == dist.get_rank(group)
    own = torch.zeros_like(values, dtype=torch.int64)
    own.scatter_add_(1, index[:, :k] % k, mine.long())
    return best[:, :k], own > 0


def _reduce(values: Tensor, group: ProcessGroup | None, operation: str) -> Tensor:
    if group is None:
        return values
    reduced = values.clone()
    operations = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
    dist.all_reduce(reduced, operations[operation], group=group)
    return reduced
