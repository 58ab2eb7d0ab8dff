"""Sums and means, accumulated in float32 or in half by a tree, and shared among ranks.

Called inside forward and backward of one autograd function, so none of it is differentiable. Each
function is one collective.

A sum of many half values leaves the range of half, and a running sum loses what is below its last
bit: at n = 100,000 it is 90 % low. So half values are averaged in blocks of 256, and the blocks'
means again, by pairs (a + b)/2, each rounded to half.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed import ProcessGroup

HALF_DTYPES = frozenset({torch.float16, torch.bfloat16})
BLOCK = 256
Function = TypeVar("Function", bound=Callable[..., Any])
Count = int | Tensor
"""A number of values; a 0-dimensional int64 tensor where ranks share the batch."""


def constant_in_traces(function: Function) -> Function:
    """Mark a function as does `torch.compiler.assume_constant_result`, which loads the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_transformed(grad: Tensor | None = None) -> bool:
    """Return whether `torch.func`, or forward mode, transforms what is computed now.

    Also whether a tracer records it, as for ONNX, which knows no function with its own backward;
    and whether a gradient is many: `torch.autograd.grad(…, is_grads_batched=True)`.
    """
    if torch.compiler.is_compiling():
        return bool(_in_transform())
    many = grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)
    return bool(many or torch._C._is_tracing() or _in_transform())


def is_eager(x: Tensor) -> bool:
    """Return whether x is torch's own, and what is done with it is computed and nothing else.

    Then its values may be looked at, kernels may read its memory, and results may be written over.
    """
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter) or x.is_neg():
        return False
    return not (torch._C._len_torch_dispatch_stack() or torch._C._is_tracing() or _in_transform())


@constant_in_traces
def _in_transform() -> bool:
    """Return whether a transform is active; a compiler runs this once and guards the transforms."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class Share(NamedTuple):
    """The number of values that a channel has on all ranks, and on the ranks before this one."""

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
    totals = sum_over_ranks(torch.cat([sums, counts]), group)
    counts = totals[-ranks:].long()  # exact up to 2²⁴ values a rank, however many ranks there are
    if own <= 1 and int(counts.sum()) == 1:  # the ranks with more need not wait for their device
        raise ValueError("Expected more than 1 value per channel when training, got 1 on all ranks")
    return totals[:-ranks], Share(counts.sum(), counts[:rank].sum(), group)


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


def is_half(dtype: torch.dtype) -> bool:
    """Return whether values of this dtype are averaged in half."""
    return dtype in HALF_DTYPES


def count_along(values: Tensor, dims: tuple[int, ...]) -> int:
    """Return how many values one sum over `dims` has."""
    count = 1
    for dim in dims:  # math.prod of a generator would stop torch.compile
        count *= values.shape[dim]
    return count


def sum_of(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return the sum over `dims`; that of half values in float32: n times their mean in half.

    For a CPU it is compiled for each sample of a batch, and then over these: a loop over all for 16
    channels at a time would read memory in steps, once for each 16.
    """
    if not is_half(values.dtype):
        if torch.compiler.is_compiling() and values.is_cpu and len(dims) > 1 and dims[0] == 0:
            return values.sum(dims[1:]).sum(0)
        return values.sum(dims)
    return half_mean(values, dims).float() * count_along(values, dims)


def half_mean_of_inputs(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return the mean as `half_mean` does, exactly where the values are all the same.

    They are averaged as distances from the first of them, so that a mean far from 0 is rounded as
    any half number is, and no more: x − μ is to be 0 where x is constant. The distances are halved
    first, since they may be twice as large as the values.
    """
    if not values.numel():
        return half_mean(values, dims)
    first = values
    for dim in dims:
        first = first.narrow(dim, 0, 1)
    distance = half_mean(torch.sub(values * 0.5, first, alpha=0.5), dims)
    return torch.add(first.reshape(distance.shape), distance, alpha=2)


def sum_of_sizes(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return the sum of |values| as `sum_of` does, in one pass where torch is good at it.

    On a CPU its vector norm is a running sum: of 400,000 float32 values it is 3e-5 off. With the
    channels last it takes 0.9 to 2 times a batch norm's forward and backward, too.
    """
    if is_half(values.dtype) or values.device.type == "cpu":
        return sum_of(values.abs(), dims)
    total: Tensor = torch.linalg.vector_norm(values, 1, dims)
    return total


def share_mean(
    values: Tensor, dims: tuple[int, ...], group: ProcessGroup | None
) -> tuple[Tensor, Share]:
    """Return the mean over `dims` and the ranks, and how many values it is taken over."""
    own = count_along(values, dims)
    if not is_half(values.dtype):
        sums, share = share_sums(sum_of(values, dims), own, group)
        return sums / share.total, share
    mean = half_mean_of_inputs(values, dims)
    if group is None:
        return mean, Share(own)  # the sum is what float32 might not hold
    sums, share = share_sums(mean.float() * own, own, group)
    return (sums / share.total).to(values.dtype), share


def mean_of(values: Tensor, dims: tuple[int, ...], share: Share) -> Tensor:
    """Return the mean over `dims` and the ranks, in the dtype of the values."""
    if share.group is None and is_half(values.dtype):
        return half_mean(values, dims)  # whose sum float32 might not hold
    return mean_of_sums(sum_of(values, dims), share, values.dtype)


def mean_of_sums(sums: Tensor, share: Share, dtype: torch.dtype) -> Tensor:
    """Return what the ranks' sums make of all their values on average, in `dtype`."""
    return (sum_over_ranks(sums, share.group) / share.total).to(dtype)


def half_mean(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return the mean over `dims` with every partial result in the dtype of the values."""
    reduced = sorted(dim % values.dim() for dim in dims)
    kept = [dim for dim in range(values.dim()) if dim not in reduced]
    shape = [values.shape[dim] for dim in kept]
    count = count_along(values, tuple(reduced))
    if not values.numel():
        return values.new_zeros(shape)
    rows = values.permute(*kept, *reduced).reshape(*shape, count)
    block = min(BLOCK, next_power_of_two(count))
    means = _mean_by_pairs(F.pad(rows, (0, -count % block)).view(*shape, -1, block))
    blocks = next_power_of_two(means.shape[-1])
    mean = _mean_by_pairs(F.pad(means, (0, blocks - means.shape[-1])))
    return mean * (blocks * block / count)  # 1 to 4, for the zeros at the ends


def _mean_by_pairs(rows: Tensor) -> Tensor:
    """Return the mean of the last dimension, whose size is a power of two."""
    while rows.shape[-1] > 1:
        left, right = rows.chunk(2, -1)
        rows = torch.add(left * 0.5, right, alpha=0.5)
    return rows.squeeze(-1)


def next_power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
