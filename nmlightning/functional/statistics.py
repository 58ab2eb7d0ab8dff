"""Statistics that estimate the standard deviation: values, constants and derivatives.

A statistic m(d) of the deviations d = x − μ is positive and scales with them, m(a·d) = a·m(d). All
is computed in the dtype of accumulation. The gradient conventions hold for every path: s = +1 where
d > 0 and −1 elsewhere, a valid subgradient; among equal extremes the first position counts (lowest
rank, then lowest position).

The range is halved, since the whole, of 8 σ, leaves float16 sooner than the values do. It is taken
over chunks of a channel's elements in the order (rank, N, *spatial); where their number is no
multiple of the number of chunks, the first chunks have one element more.
"""

import operator
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from nmlightning.errors import InputError
from nmlightning.functional import constants
from nmlightning.functional.reductions import (
    Count,
    Share,
    constant_in_traces,
    gather_from_ranks,
    is_eager,
    is_half,
    keep_first_largest,
    mean_of,
    mean_of_sums,
    sum_of,
    sum_of_sizes,
)
from nmlightning.functional.selection import (
    Selection,
    add_at_selection,
    highest_and_lowest,
    mean_of_row,
    select_largest,
)

HUGE = 2.0**48  # of larger ŝ, sums of squares may be infinite in float32; eps is nothing to it


def power_mean(deviations: Tensor, p: float, dims: tuple[int, ...], share: Share) -> Tensor:
    """Return (mean |d|^p)^(1/p) over `dims` and the ranks.

    Other powers than 1 and 2 are taken of |d| / max|d|, which neither overflow nor underflow, with
    each rank's own maximum.
    """
    half, alone = is_half(deviations.dtype), share.group is None
    if p == 1.0 and not half:
        return mean_of_sums(sum_of_sizes(deviations, dims), share, deviations.dtype)
    # Float16 is not to hold the squares of what is above 255: that is what the paper shows.
    scaled = alone and deviations.dtype == torch.bfloat16
    if p == 2.0 and not scaled:
        root = mean_of(deviations.square(), dims, share).sqrt()
        if half or not (alone and torch.compiler.is_compiling()):
            return root  # whose user looks whether it is finite
        shrunk = mean_of((deviations / HUGE**2).square(), dims, share).sqrt()  # in the same loop
        return torch.where(root < torch.inf, root, shrunk * HUGE**2)
    sizes = deviations.abs()
    if p == 1.0:
        return mean_of(sizes, dims, share)
    # The sum is that of no elements, with their dimensions: a rank may have none of the batch.
    largest = sizes.amax(dims, True) if sizes.numel() else sizes.sum(dims, True)
    if p == 2.0:
        unit = torch.where(largest > HUGE, largest, 1.0)
        mean = mean_of((sizes / unit).square(), dims, share)
        return mean.sqrt() * unit.view(mean.shape)
    sums = sum_of((sizes / _nonzero(largest)).pow(p), dims)
    largest = largest.reshape(sums.shape).to(sums.dtype)
    if share.group is not None:
        gathered = gather_from_ranks(torch.stack([largest, sums]), share.group)
        largest, sums = _join(gathered[:, 0], gathered[:, 1], p)
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


def select_extremes(deviations: Tensor, chunks: int, share: Share) -> tuple[Tensor, Selection]:
    """Return the mean half range of the chunks of (N, C, *), (C,), and where their extremes are.

    Each chunk has at least two elements of all ranks together.
    """
    all_lengths = chunk_lengths(int(share.total), chunks)
    equal = all_lengths[0] == all_lengths[-1] and deviations.numel() > 0
    if equal and share.group is None and not torch.compiler.is_compiling():
        values, positions = highest_and_lowest(deviations, chunks)
    else:
        rows = deviations.transpose(0, 1).flatten(1)
        lengths = _own_lengths(all_lengths, int(share.before), rows.shape[1])
        # The lowest is the highest of −d.
        sides = [_highest(side, lengths) for side in (rows, -rows)]
        values, positions = (torch.cat(parts, 1) for parts in zip(*sides, strict=True))
    extremes, mine = keep_first_largest(values, share.group)
    slopes = torch.full_like(values, 0.5 / chunks)
    slopes[:, chunks:] *= -1
    if mine is not None:
        slopes = slopes * mine
    halves = torch.add(0.5 * extremes[:, :chunks], extremes[:, chunks:], alpha=0.5)
    return mean_of_row(halves), Selection(positions, slopes)


def chunk_lengths(count: int, chunks: int) -> list[int]:
    """Return how many of `count` elements each chunk has; the first have one more, if any."""
    if count < 2 * chunks:
        raise InputError(
            f"The {chunks} chunks of n = {count} values a channel have fewer than two each: "
            'lower chunks, as by swap_norms(model, "range", {"chunks": 4}).'
        )
    length, longer = count // chunks, count % chunks  # torch.compile does not know divmod
    return [length + 1] * longer + [length] * (chunks - longer)


def _own_lengths(lengths: list[int], before: int, own: int) -> list[int]:
    """Return how many elements of each chunk this rank has, which has `own` behind `before`."""
    ends = [sum(lengths[: i + 1]) - before for i in range(len(lengths))]
    clamped = [min(max(end, 0), own) for end in ends]
    return [end - start for start, end in zip([0, *clamped], clamped, strict=False)]


def _highest(rows: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Return the highest of each chunk of (C, n) rows, (C, chunks), and the first position of it.

    The highest of no elements is −∞ at position 0.
    """
    values, positions, start = [], [], 0
    for length, run in groupby(lengths):
        blocks = len(list(run))
        end = start + blocks * length
        part = rows[:, start:end].reshape(len(rows), blocks, length)
        value, position = _first_highest(part)
        values.append(value)
        offsets = torch.arange(start, end, length, device=rows.device) if length else 0
        positions.append(position + offsets)
        start = end
    return torch.cat(values, 1), torch.cat(positions, 1)


def _first_highest(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the highest of the last dimension, and its first position there."""
    length = blocks.shape[-1]
    if not length:
        nothing = blocks.new_full(blocks.shape[:-1], -torch.inf)
        return nothing, torch.zeros_like(nothing, dtype=torch.int64)
    value = blocks.amax(-1)
    positions = torch.arange(length, device=blocks.device)
    # Where a NaN is the highest, nothing equals it: any position will do.
    position = torch.where(blocks == value.unsqueeze(-1), positions, length - 1).amin(-1)
    return value, position


@dataclass(frozen=True)
class PowerMean:
    """(mean |d|^p)^(1/p): L1 for p = 1, the standard deviation for p = 2."""

    p: float
    _constant: float = field(init=False, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The statistic in a few words, for messages."""
        return f"p = {self.p:g}"

    def __post_init__(self) -> None:
        object.__setattr__(self, "_constant", constants.power_mean_constant(self.p))

    def __setstate__(self, state: dict[str, float]) -> None:  # version 0.1.0 pickled p alone
        object.__setattr__(self, "p", state["p"])
        self.__post_init__()

    def constant(self, count: Count, convention: constants.Constant | float) -> float:
        """Return c of ŝ = c · m; it does not depend on the count."""
        if isinstance(convention, float):
            return convention
        return 1.0 if convention == "none" else self._constant

    def measure(self, deviations: Tensor, share: Share) -> tuple[Tensor, Selection | None]:
        """Return m of each channel of (N, C, *), (C,); it depends on all elements."""
        return power_mean(deviations, self.p, reduced_dims(deviations), share), None


@dataclass(frozen=True)
class LargestMean:
    """Mean of the k largest |d|: L∞ for k = 1."""

    k: int

    @property
    def name(self) -> str:
        return "the largest value" if self.k == 1 else f"the {self.k} largest values"

    def constant(self, count: Count, convention: constants.Constant | float) -> float:
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
        return select_largest(deviations, self.k, share)


@dataclass(frozen=True)
class RangeMean:
    """Mean of half the range, (max d − min d)/2, over equal chunks of a channel."""

    chunks: int
    name = "the range"

    def constant(self, count: Count, convention: constants.Constant | float) -> float:
        """Return 2c of ŝ = c · range = 2c · m; InputError for chunks of less than two elements."""
        n = _as_int(count)
        chunk_lengths(n, self.chunks)  # which raises
        if isinstance(convention, float):
            return 2 * convention
        return 2 * float(_range_mean_constant(operator.index(n), self.chunks, convention))

    def measure(self, deviations: Tensor, share: Share) -> tuple[Tensor, Selection]:
        return select_extremes(deviations, self.chunks, share)


Statistic = PowerMean | LargestMean | RangeMean


def is_bounded(scale: Tensor) -> bool | None:
    """Return whether all ŝ in float32 are so small that the sums behind them are finite.

    None where to look would wait for a device, or be traced: torch's norms overflow there, too.
    """
    return float(scale.max()) < HUGE if is_readable(scale) else None  # of NaN, too, it is false


def is_readable(x: Tensor) -> bool:
    """Return whether float32 values can be looked at without waiting for a device, untraced."""
    return x.dtype == torch.float32 and x.is_cpu and x.numel() > 0 and is_eager(x)


def total_scale(scale: Tensor, eps: float, bounded: bool | None = None) -> Tensor:
    """Return √(ŝ² + eps); in half without squares, which half cannot hold.

    That is m · √(1 + (l/m)²) with the larger m and the lesser l of ŝ and √eps.
    """
    if not is_half(scale.dtype):
        root = (scale.square() + eps).sqrt()
        return root if bounded else torch.where(scale > HUGE, scale, root)
    root = torch.full_like(scale, eps**0.5)
    larger, lesser = torch.maximum(scale, root), torch.minimum(scale, root)
    ratio = lesser / torch.where(larger > 0, larger, 1.0)
    return larger * (1 + ratio * ratio).sqrt()


def _as_int(count: Count) -> int:
    return int(count.item()) if isinstance(count, Tensor) else count


# torch.compile takes what these two return as constants, instead of tracing the quadrature. Their
# callers pass counts through operator.index, which makes it specialise on a batch's size.


@constant_in_traces
def _largest_mean_constant(n: int, k: int, convention: constants.Constant) -> float:
    return constants.top_k_constant(n, k, convention)


@constant_in_traces
def _range_mean_constant(n: int, chunks: int, convention: constants.Constant) -> float:
    expected = [
        1 / constants.range_constant(length, convention) for length in chunk_lengths(n, chunks)
    ]
    return chunks / sum(expected)


class Slope:
    """The derivative of a statistic of (N, C, *), without a dense tensor where it is sparse.

    Args:
        x: (N, C, *), of the dtype of accumulation.
        mean: μ, (C,).
        magnitude: m of each channel, (C,).
        statistic: which one.
        count: elements of a channel, on all ranks.
        selection: the elements that m depends on, or None for all.
    """

    def __init__(
        self,
        x: Tensor,
        mean: Tensor,
        magnitude: Tensor,
        statistic: Statistic,
        count: Count,
        selection: Selection | None,
    ) -> None:
        self.selection = selection
        self.count = count
        self.dims, self.shape = reduced_dims(x), channel_shape(x)
        if isinstance(statistic, PowerMean):
            self.reflected = power_mean_slope(
                mean.view(self.shape) - x, magnitude.view(self.shape), statistic.p
            )

    def sum(self) -> Tensor:
        """Return Σt of this rank's elements, (C,)."""
        if self.selection is not None:
            return self.selection.slopes.sum(1)
        return -sum_of(self.reflected, self.dims) / self.count

    def scaled(self, factor: Tensor) -> Tensor:
        """Return what makes `add_to` add factor · t, with a factor for each channel, (C,)."""
        return -factor / self.count if self.selection is None else factor

    def add_to(self, tensor: Tensor, scaled: Tensor) -> Tensor:
        """Add factor · t to `tensor`, in place."""
        if self.selection is None:
            each = scaled.to(tensor.dtype).view(self.shape)
            return tensor.addcmul_(self.reflected, each)
        return add_at_selection(tensor, self.selection, scaled.unsqueeze(1) * self.selection.slopes)


def reduced_dims(x: Tensor) -> tuple[int, ...]:
    """Return the dimensions of (N, C, *) that a channel's elements lie along."""
    return (0, *range(2, x.dim()))


def channel_shape(x: Tensor) -> list[int]:
    """Return the shape that spreads (C,) over (N, C, *)."""
    return [1, -1] + [1] * (x.dim() - 2)
