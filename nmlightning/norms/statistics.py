"""The statistics that can stand for the standard deviation: what they are, and their constants.

A statistic m(d) of the deviations d = x − μ is positive and scales with them, m(a·d) = a·m(d). All
is computed in the dtype of accumulation. The gradient conventions hold for every path: s = +1 where
d > 0 and −1 elsewhere, a valid subgradient; among equal extremes the first position counts (lowest
rank, then lowest position).
"""

import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from nmlightning.errors import InputError
from nmlightning.norms.accumulation import is_half
from nmlightning.norms.chunk_range import chunk_lengths, select_extremes
from nmlightning.norms.cross_rank import Count, Share
from nmlightning.norms.gaussian import (
    Constant,
    power_mean_constant,
    range_constant,
    top_k_constant,
)
from nmlightning.norms.power_mean import power_mean
from nmlightning.norms.selection import Selection, select_largest


@dataclass(frozen=True)
class PowerMean:
    """(mean |d|^p)^(1/p): L1 for p = 1, the standard deviation for p = 2."""

    p: float

    def constant(self, count: Count, convention: Constant | float) -> float:
        """Return c of ŝ = c · m; it does not depend on the count."""
        if isinstance(convention, float):
            return convention
        return 1.0 if convention == "none" else power_mean_constant(self.p)

    def measure(self, deviations: Tensor, share: Share) -> tuple[Tensor, Selection | None]:
        """Return m of each channel of (N, C, *), (C,); it depends on all elements."""
        return power_mean(deviations, self.p, (0, *range(2, deviations.dim())), share), None


@dataclass(frozen=True)
class LargestMean:
    """Mean of the k largest |d|: L∞ for k = 1."""

    k: int

    def constant(self, count: Count, convention: Constant | float) -> float:
        """Return c of ŝ = c · m for `count` elements; InputError if those are fewer than k."""
        n = _as_int(count)
        if self.k > n:
            raise InputError(
                f"The k = {self.k} largest of n = {n} values a channel do not exist; lower k."
            )
        if isinstance(convention, float):
            return convention
        # torch.compile specialises on an index, where it would trace into an integral otherwise.
        return float(_largest_mean_constant(operator.index(n), self.k, convention))

    def measure(self, deviations: Tensor, share: Share) -> tuple[Tensor, Selection]:
        """Return m of each channel of (N, C, *), (C,), and the elements that it depends on."""
        return select_largest(deviations, self.k, share)


@dataclass(frozen=True)
class RangeMean:
    """Mean of half the range, (max d − min d)/2, over equal chunks of a channel."""

    chunks: int

    def constant(self, count: Count, convention: Constant | float) -> float:
        """Return 2c of ŝ = c · range = 2c · m; InputError for chunks of less than two elements."""
        n = _as_int(count)
        if n < 2 * self.chunks:
            raise InputError(
                f"The {self.chunks} chunks of n = {n} values a channel have fewer than two each; "
                "lower chunks."
            )
        if isinstance(convention, float):
            return 2 * convention
        return 2 * float(_range_mean_constant(operator.index(n), self.chunks, convention))

    def measure(self, deviations: Tensor, share: Share) -> tuple[Tensor, Selection]:
        """Return m of each channel of (N, C, *), (C,), and the elements that it depends on."""
        return select_extremes(deviations, self.chunks, share)


Statistic = PowerMean | LargestMean | RangeMean


def total_scale(scale: Tensor, eps: float) -> Tensor:
    """Return √(ŝ² + eps); in half without squares, which half cannot hold.

    That is m · √(1 + (l/m)²) with the larger m and the lesser l of ŝ and √eps.
    """
    if not is_half(scale.dtype):
        return (scale.square() + eps).sqrt()
    root = torch.full_like(scale, eps**0.5)
    larger, lesser = torch.maximum(scale, root), torch.minimum(scale, root)
    ratio = lesser / torch.where(larger > 0, larger, 1.0)
    return larger * (1 + ratio * ratio).sqrt()


def _as_int(count: Count) -> int:
    return int(count.item()) if isinstance(count, Tensor) else count


# torch.compile takes what these two return as constants, instead of tracing how it is found. Their
# callers pass counts through operator.index, which makes it specialise on a batch's size.


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _largest_mean_constant(n: int, k: int, convention: Constant) -> float:
    return top_k_constant(n, k, convention)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _range_mean_constant(n: int, chunks: int, convention: Constant) -> float:
    if convention == "none":
        return 1.0
    expected = [1 / range_constant(length, convention) for length in chunk_lengths(n, chunks)]
    return chunks / sum(expected)
