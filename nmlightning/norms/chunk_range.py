"""Half the range (max d − min d)/2, a mean over equal chunks of a channel, and what it depends on.

Half of it, since the whole, of 8 σ, leaves float16 sooner than the values do.

A channel's elements stand in the order (rank, N, *spatial). Where their number is not a multiple of
the number of chunks, the first chunks have one element more.
"""

from itertools import groupby

import torch
from torch import Tensor

from nmlightning.norms.cross_rank import Share, keep_first_largest
from nmlightning.norms.selection import Selection, mean_of_row


def select_extremes(deviations: Tensor, chunks: int, share: Share) -> tuple[Tensor, Selection]:
    """Return the mean half range of each channel's chunks, (C,), and where their extremes are.

    Args:
        deviations: (N, C, *spatial).
        chunks: how many, with at least two elements of all ranks together in each.
        share: the ranks.
    """
    rows = deviations.transpose(0, 1).flatten(1)
    lengths = _own_lengths(
        chunk_lengths(int(share.total), chunks), int(share.before), rows.shape[1]
    )
    # Highest and lowest in one go: the lowest is the highest of −d.
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
    places = torch.arange(length, device=blocks.device)
    # Where a NaN is the highest, nothing equals it: any place will do.
    place = torch.where(blocks == value.unsqueeze(-1), places, length - 1).amin(-1)
    return value, place
