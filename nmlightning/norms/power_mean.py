"""(mean |d|^p)^(1/p) of the deviations d = x − μ, and its derivative."""

import torch
from torch import Tensor

from nmlightning.norms.accumulation import mean_of, mean_of_sums, sum_of, sum_of_sizes
from nmlightning.norms.cross_rank import Share, gather_from_ranks


def power_mean(deviations: Tensor, p: float, dims: tuple[int, ...], share: Share) -> Tensor:
    """Return (mean |d|^p)^(1/p) over `dims` and the ranks.

    Other powers than 1 and 2 are taken of |d| / max|d|, which neither overflow nor underflow, with
    each rank's own maximum.
    """
    if p == 1.0:
        return mean_of_sums(sum_of_sizes(deviations, dims), share, deviations.dtype)
    if p == 2.0:
        return mean_of(deviations.square(), dims, share).sqrt()
    sizes = deviations.abs()
    # The sum is that of no elements, with their dimensions: a rank may have none of the batch.
    largest = sizes.amax(dims, True) if sizes.numel() else sizes.sum(dims, True)
    sums = sum_of((sizes / _nonzero(largest)).pow(p), dims)
    largest = largest.reshape(sums.shape).to(sums.dtype)
    if share.group is not None:
        told = gather_from_ranks(torch.stack([largest, sums]), share.group)
        largest, sums = _join(told[:, 0], told[:, 1], p)
    return (largest * (sums / share.total).pow(1 / p)).to(deviations.dtype)


def power_mean_slope(reflected: Tensor, magnitude: Tensor, p: float) -> Tensor:
    """Return count · ∂m/∂e, elementwise, for e = −d = μ − x: ±(|e| / m)^(p−1), with + where e = 0.

    So ∂m/∂d = −∂m/∂e is negative where x = μ, as the convention has it. It is 0 where m is 0, for
    p > 1. Taking −d makes one pass of the sign: x − x is +0, and copysign keeps it.
    """
    if p == 1.0:
        return torch.copysign(reflected.new_ones(()), reflected)
    ratio = reflected / torch.where(magnitude > 0, magnitude, 1.0)
    return ratio if p == 2.0 else torch.copysign(ratio.abs().pow(p - 1), ratio)


def _join(largest: Tensor, sums: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return the largest of all ranks, and the sum of all powers, of |d| over that."""
    overall = largest.amax(0)
    return overall, (sums * (largest / _nonzero(overall)).pow(p)).sum(0)


def _nonzero(values: Tensor) -> Tensor:
    """Return the values with 1 where they are 0, to divide by."""
    return torch.where(values > 0, values, 1.0)
