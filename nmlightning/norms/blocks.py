"""The elements of a channel in blocks, and the largest size in each, to leave the others out."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST = 128  # elements of a block: few to look through, and enough for a fast reduction
_SMALLEST = 16
_FAST_ROW = 128  # elements next to each other that a reduction needs to be vectorised


@dataclass(frozen=True)
class Blocks:
    """(N, C, *spatial), cut into blocks of a channel's neighbours in the order of (N, *spatial).

    Attributes:
        rows: the values, (N, C, blocks, size) as they lie in memory, or (blocks, size, C).
        size: elements of a block.
    """

    rows: Tensor
    size: int

    @classmethod
    def of(cls, values: Tensor) -> "Blocks":
        """Return the blocks of values, copied unless they are contiguous or have channels last."""
        n, channels = values.shape[:2]
        spatial = values.numel() // (n * channels)
        size = _divide(spatial)
        channels_last = values.movedim(1, -1)
        if channels_last.is_contiguous() and not values.is_contiguous():
            return cls(channels_last.reshape(n * spatial // size, size, channels), size)
        return cls(values.reshape(n, channels, spatial // size, size), size)

    def largest_sizes(self) -> Tensor:
        """Return max |value| of each block, (C, N · blocks), in two reads and no writing."""
        if self.rows.dim() == 4:
            sizes = torch.maximum(self.rows.amax(3), -self.rows.amin(3)).transpose(0, 1).flatten(1)
        else:
            sizes = torch.maximum(self._reduce(torch.amax), -self._reduce(torch.amin)).t()
        return sizes.abs()  # of 0, which may be -0

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
    return (
        count
        if count < _LARGEST
        else next((size for size in range(_LARGEST, 4 * _LARGEST) if count % size == 0), 1)
    )
