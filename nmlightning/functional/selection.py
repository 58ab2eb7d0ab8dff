"""The k largest deviations of a channel, found block by block.

Among equal values the first position counts (lowest rank, then lowest position).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nmlightning.functional.reductions import Share, half_mean, is_half, keep_largest_of_ranks

_LARGEST = 128  # elements of a block: few to look through, and enough for a fast reduction
_SMALLEST = 16
_FAST_ROW = 128  # elements next to each other that a reduction needs to be vectorised


@dataclass(frozen=True)
class Blocks:
    """(N, C, *spatial), cut into blocks of a channel's neighbours in the order of (N, *spatial)."""

    rows: Tensor  # the values, (N, C, blocks, size) as they lie in memory, or (blocks, size, C)
    size: int  # elements of a block

    @classmethod
    def of(cls, values: Tensor, within: int = 0) -> "Blocks":
        """Return the blocks of values, copied unless they are contiguous or have channels last.

        Their size divides `within`, too, if that is given.
        """
        n, channels = values.shape[:2]
        spatial = values.numel() // (n * channels)
        size = _divide(math.gcd(spatial, within) if within else spatial)
        channels_last = values.movedim(1, -1)
        if channels_last.is_contiguous() and not values.is_contiguous():
            return cls(channels_last.reshape(n * spatial // size, size, channels), size)
        return cls(values.reshape(n, channels, spatial // size, size), size)

    def largest_sizes(self) -> Tensor:
        """Return max |value| of each block, (C, N · blocks), in two reads and no writing."""
        return torch.maximum(*self.extremes()).abs()  # of 0, which may be -0

    def extremes(self) -> tuple[Tensor, Tensor]:
        """Return the highest value and −1 times the lowest of each block, (C, N · blocks)."""
        if self.rows.dim() == 4:
            high, low = (end(self.rows, 3).transpose(0, 1) for end in (torch.amax, torch.amin))
            return high.flatten(1), -low.flatten(1)
        return self._reduce(torch.amax).t(), -self._reduce(torch.amin).t()

    def take(self, chosen: Tensor) -> Tensor:
        """Return the values of (C, k) blocks, (C, k · size)."""
        if self.rows.dim() == 4:
            channel = torch.arange(self.rows.shape[1], device=chosen.device).unsqueeze(1)
            count = self.rows.shape[2]
            return self.rows[chosen // count, channel, chosen % count].flatten(1)
        channel = torch.arange(self.rows.shape[2], device=chosen.device).unsqueeze(1)
        return self.rows[chosen, :, channel].flatten(1)

    def _reduce(self, extreme: Callable[..., Tensor]) -> Tensor:
        """Return the extreme of each block, (blocks, C), by rows that are long enough."""
        blocks, size, channels = self.rows.shape
        joined = 1
        while joined * channels < _FAST_ROW and size % (2 * joined) == 0:
            joined *= 2
        rows = extreme(self.rows.reshape(blocks, size // joined, joined * channels), 1)
        return extreme(rows.view(blocks, joined, channels), 1)


def _divide(count: int) -> int:
    """Return a divisor of a count that is a good size for a block."""
    for size in range(min(count, _LARGEST), _SMALLEST - 1, -1):
        if count % size == 0:
            return size
    if count < _LARGEST:
        return count
    return next((size for size in range(_LARGEST, 4 * _LARGEST) if count % size == 0), 1)


class Selection(NamedTuple):
    """The elements that a statistic m was taken over: (C, k) positions and slopes.

    A position counts along (N, *spatial) of its channel; a slope is ∂m/∂d there, 0 where another
    rank holds the element.
    """

    positions: Tensor
    slopes: Tensor


def select_largest(deviations: Tensor, k: int, share: Share) -> tuple[Tensor, Selection]:
    """Return the mean of the k largest |d| of (N, C, *), (C,), and which elements they are.

    The ranks have at least k elements in a channel together.
    """
    positions, signed = _largest_deviations(deviations, k)
    values, mine = keep_largest_of_ranks(signed.abs(), share.group)
    slopes = torch.where(signed > 0, 1.0, -1.0).to(signed.dtype) / k
    if mine is not None:
        slopes = slopes * mine
    return mean_of_row(values), Selection(positions, slopes)


def highest_and_lowest(deviations: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """Return the highest d and −1 times the lowest of equal chunks of (N, C, *), and where.

    Values and positions are (C, 2 · chunks), each chunk's first among equals. Only the block with
    an extreme is searched for its position.
    """
    length = deviations.numel() // deviations.shape[1] // chunks
    blocks = Blocks.of(deviations, length)
    first = torch.arange(chunks, device=deviations.device) * (length // blocks.size)
    values, positions = [], []
    for ends, sign in zip(blocks.extremes(), (1, -1), strict=True):
        chosen = ends.reshape(len(ends), chunks, -1).argmax(2) + first
        candidates = blocks.take(chosen).reshape(len(ends), chunks, -1) * sign
        place = candidates.argmax(2, keepdim=True)
        values.append(candidates.gather(2, place).squeeze(2))
        positions.append(chosen * blocks.size + place.squeeze(2))
    return torch.cat(values, 1), torch.cat(positions, 1)


def mean_of_row(values: Tensor) -> Tensor:
    """Return the mean of each row of (C, k)."""
    return half_mean(values, (1,)) if is_half(values.dtype) else values.mean(1)


def add_at_selection(tensor: Tensor, selection: Selection, values: Tensor) -> Tensor:
    """Add (C, k) `values` to (N, C, *spatial) `tensor` at the selected elements, and return it.

    In place, but in traced code, which sees to that itself.
    """
    if not tensor.numel():
        return tensor
    values = values.to(tensor.dtype)
    channels, last = tensor.shape[1], tensor.movedim(1, -1)
    channel = torch.arange(channels, device=tensor.device).unsqueeze(1)
    if torch.compiler.is_compiling() or not (tensor.is_contiguous() or last.is_contiguous()):
        return _put(tensor, selection.positions, channel, values)
    if tensor.is_contiguous():
        size = tensor.numel() // (tensor.shape[0] * channels)
        image = selection.positions // size
        places = selection.positions + (image * (channels - 1) + channel) * size
        memory = tensor.view(-1)
    else:
        places = selection.positions * channels + channel
        memory = last.view(-1)
    memory.scatter_add_(0, places.view(-1), values.reshape(-1))
    return tensor


def _put(tensor: Tensor, positions: Tensor, channel: Tensor, values: Tensor) -> Tensor:
    sizes = (tensor.shape[0], *tensor.shape[2:])
    batch, *spatial = torch.unravel_index(positions, sizes)
    index = (batch, channel.expand_as(batch), *spatial)
    put = tensor.index_put if torch.compiler.is_compiling() else tensor.index_put_
    return put(index, values, accumulate=True)


def _largest_deviations(deviations: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (C, k) positions and deviations of the k largest |d|, the first among equals.

    The k largest lie in the k blocks with the largest maxima; with ties broken by position in both
    steps, this holds for the order (value, then position) too. A rank with fewer than k elements
    fills up with zeros at position 0, which rank behind its own.
    """
    if not deviations.numel():
        nothing = deviations.new_zeros(deviations.shape[1], k)
        return nothing.long(), nothing
    blocks = Blocks.of(deviations)
    chosen = _first_largest(blocks.largest_sizes(), k).sort(1).values
    candidates = blocks.take(chosen)
    best = _first_largest(candidates.abs(), k)
    positions = chosen.gather(1, best // blocks.size) * blocks.size + best % blocks.size
    values, missing = candidates.gather(1, best), k - best.shape[1]
    if missing:
        return F.pad(positions, (0, missing)), F.pad(values, (0, missing))
    return positions, values


def _first_largest(sizes: Tensor, k: int) -> Tensor:
    """Return the indices of each row's k largest, the lowest index first among equals.

    Of (C, n) sizes, none of them negative: as floating-point numbers they have the order of their
    bits, behind which the index breaks the ties. float64 leaves no room for one.
    """
    if k == 1:
        return sizes.argmax(1, keepdim=True)
    k = min(k, sizes.shape[1])
    if sizes.dtype == torch.float64 or torch._C._is_tracing():  # which has no bits
        return torch.sort(sizes, dim=1, descending=True, stable=True).indices[:, :k]
    bits = sizes.float().view(torch.int32).long() << 32
    keys = bits - torch.arange(sizes.shape[1], device=sizes.device)
    return keys.topk(k, 1).indices
