"""The statistics that can stand for the standard deviation, each with its derivative.

A statistic m(d) of the deviations d = x − μ is positive and scales with them, m(a·d) = a·m(d).
Everything here is a pure function of tensors in the dtype of accumulation (float32, or float64 for
float64 input). The gradient conventions hold for every path: s = +1 where d > 0 and −1 elsewhere, a
valid subgradient; among equal maxima the first position counts (lowest rank, then lowest position).
"""

import operator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from nmlightning.errors import InputError
from nmlightning.norms.cross_rank import keep_largest_of_ranks, max_over_ranks, sum_over_ranks
from nmlightning.norms.gaussian import Constant, power_mean_constant, top_k_constant

Count = int | Tensor
"""Elements that a statistic is taken over; a 0-dimensional tensor where ranks share the batch."""


@dataclass(frozen=True)
class PowerMean:
    """(mean |d|^p)^(1/p): L1 for p = 1, the standard deviation for p = 2."""

    p: float

    def constant(self, count: Count, convention: Constant | float) -> float:
        """Return c of ŝ = c · m; it does not depend on the count."""
        if isinstance(convention, float):
            return convention
        return 1.0 if convention == "none" else power_mean_constant(self.p)


@dataclass(frozen=True)
class LargestMean:
    """Mean of the k largest |d|: L∞ for k = 1."""

    k: int

    def constant(self, count: Count, convention: Constant | float) -> float:
        """Return c of ŝ = c · m for `count` elements; InputError if those are fewer than k."""
        n = int(count.item()) if isinstance(count, Tensor) else count
        if self.k > n:
            raise InputError(
                f"The k = {self.k} largest of n = {n} values a channel do not exist; lower k."
            )
        if isinstance(convention, float):
            return convention
        # torch.compile specialises on an index, where it would trace into an integral otherwise.
        return float(_largest_mean_constant(operator.index(n), self.k, convention))


Statistic = PowerMean | LargestMean


class Selection(NamedTuple):
    """The elements that a `LargestMean` was taken over: (C, k) positions and signs.

    A position counts along (N, *spatial) of its channel; a sign is ±1, or 0 where another rank
    holds the element.
    """

    positions: Tensor
    signs: Tensor


def power_mean(
    deviations: Tensor, p: float, dims: tuple[int, ...], count: Count, group: ProcessGroup | None
) -> Tensor:
    """Return (Σ|d|^p / count)^(1/p) over `dims`, kept as dimensions of size 1.

    Other powers than 1 and 2 are taken of |d| / max|d|, which neither overflow nor underflow.
    """
    if p == 1.0:
        total = torch.linalg.vector_norm(deviations, 1, dims, keepdim=True)
        return sum_over_ranks(total, group) / count
    if p == 2.0:
        total = deviations.square().sum(dims, keepdim=True)
        return (sum_over_ranks(total, group) / count).sqrt()
    # The sum is that of no elements, with their dimensions: a rank may have none of the batch.
    sizes = deviations.abs()
    mine = sizes.amax(dims, keepdim=True) if sizes.numel() else sizes.sum(dims, keepdim=True)
    largest = max_over_ranks(mine, group)
    scale = torch.where(largest > 0, largest, 1.0)
    total = (sizes / scale).pow(p).sum(dims, keepdim=True)
    return scale * (sum_over_ranks(total, group) / count).pow(1 / p)


def power_mean_slope(reflected: Tensor, magnitude: Tensor, p: float) -> Tensor:
    """Return count · ∂m/∂e, elementwise, for e = −d = μ − x: ±(|e| / m)^(p−1), with + where e = 0.

    So ∂m/∂d = −∂m/∂e is negative where x = μ, as the convention has it. It is 0 where m is 0, for
    p > 1. Taking −d makes one pass of the sign: x − x is +0, and copysign keeps it.
    """
    if p == 1.0:
        return torch.copysign(reflected.new_ones(()), reflected)
    ratio = reflected / torch.where(magnitude > 0, magnitude, 1.0)
    return ratio if p == 2.0 else torch.copysign(ratio.abs().pow(p - 1), ratio)


def select_largest(
    deviations: Tensor, k: int, group: ProcessGroup | None
) -> tuple[Tensor, Selection]:
    """Return the mean of the k largest |d| of each channel, (C,), and which elements they are.

    Args:
        deviations: (N, C, *spatial).
        k: how many, at most what the ranks have in a channel together.
        group: the ranks, if there are several.
    """
    positions, signed = _largest_deviations(deviations, k)
    values, mine = keep_largest_of_ranks(signed.abs(), group)
    signs = torch.where(signed > 0, 1.0, -1.0).to(signed.dtype)
    if mine is not None:
        signs = signs * mine
    return values.mean(1), Selection(positions, signs)


def add_at_selection(tensor: Tensor, selection: Selection, values: Tensor) -> Tensor:
    """Return (N, C, *spatial) `tensor` with (C, k) `values` added at the selected elements."""
    if not tensor.numel():
        return tensor
    sizes = (tensor.shape[0], *tensor.shape[2:])
    batch, *spatial = torch.unravel_index(selection.positions, sizes)
    channel = torch.arange(tensor.shape[1], device=tensor.device).unsqueeze(1)
    index = (batch, channel.expand_as(batch), *spatial)
    return tensor.index_put(index, values.to(tensor.dtype), accumulate=True)


def _largest_deviations(deviations: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (C, k) positions and deviations of the k largest |d|, the first among equals.

    The k largest lie in the k rows (of the last dimension) with the largest row maxima; with ties
    broken by position in both steps, this holds for the order (value, then position) too. A rank
    with fewer than k elements fills up with zeros at position 0, which rank behind its own.
    """
    n, channels = deviations.shape[:2]
    if not deviations.numel():
        nothing = deviations.new_zeros(channels, k)
        return nothing.long(), nothing
    rows = deviations.reshape(n, channels, -1, deviations.shape[-1] if deviations.dim() > 2 else 1)
    height, width = rows.shape[2:]
    maxima = rows.abs().amax(3).transpose(0, 1).flatten(1)
    chosen = _first_largest(maxima, k).sort(1).values
    channel = torch.arange(channels, device=deviations.device).unsqueeze(1)
    candidates = rows[chosen // height, channel, chosen % height].flatten(1)
    best = _first_largest(candidates.abs(), k)
    positions = chosen.gather(1, best // width) * width + best % width
    missing = k - best.shape[1]
    return F.pad(positions, (0, missing)), F.pad(candidates.gather(1, best), (0, missing))


def _first_largest(values: Tensor, k: int) -> Tensor:
    """Return the indices of each row's k largest, the lowest index first among equals."""
    return torch.sort(values, dim=1, descending=True, stable=True).indices[:, :k]


# torch.compile takes what these two return as constants, instead of tracing how it is found. Their
# callers pass counts through operator.index, which makes it specialise on a batch's size.


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _largest_mean_constant(n: int, k: int, convention: Constant) -> float:
    return top_k_constant(n, k, convention)
