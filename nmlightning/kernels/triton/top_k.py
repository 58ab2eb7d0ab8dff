"""The k largest |x − μ| of each channel, in the order (largest first, then first position).

One pass stores the extremes of every block of a channel, and the sums that μ follows from:
max|x − μ| = max(max x − μ, μ − min x), so no second pass is needed. The k largest lie in the k
blocks with the largest of these; since blocks are in order, that holds with ties, too. So one
program then takes, k times, the first of the blocks with the largest |x − μ| that is left, and
reads that block to find the element and what is left of the block.
"""

import triton
import triton.language as tl

from nmlightning.kernels.triton.forward import finish_statistics, mean_from
from nmlightning.kernels.triton.tiles import (
    STAGES,
    begin,
    first_of,
    in_elements,
    load_channels,
    load_parts,
    max_tile,
    offsets_at,
    place,
    store_part,
    sum_tile,
)


@triton.jit
def find_extremes(x, differences, highest, lowest, R, C, S, tiles, blocks, TILE: tl.constexpr):
    """Store Σ(x − x₀), max x and min x of each block."""
    C, S, column, block, channels, present = begin(C, S, TILE)
    origin = first_of(x, channels, present, S, TILE)
    total = tl.zeros((TILE.HEIGHT, TILE.WIDTH), tl.float32)
    above = tl.full((TILE.HEIGHT, TILE.WIDTH), float("-inf"), tl.float32)
    below = tl.full((TILE.HEIGHT, TILE.WIDTH), float("-inf"), tl.float32)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        offsets, mask, _ = place(block * tiles + tile, column, R, C, S, TILE)
        values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        total += tl.where(mask, values - origin, 0.0)
        above = tl.maximum(above, tl.where(mask, values, float("-inf")))
        below = tl.maximum(below, tl.where(mask, -values, float("-inf")))
    store_part(differences, sum_tile(total, TILE), block, blocks, channels, present, C, TILE)
    store_part(highest, max_tile(above, TILE), block, blocks, channels, present, C, TILE)
    store_part(lowest, -max_tile(below, TILE), block, blocks, channels, present, C, TILE)


@triton.jit
def select_largest(
    x, mean, differences, highest, lowest, positions, deviations, statistics, running_mean,
    running_var, batches, weight, momentum, constant, eps, R, C, S, span, blocks, K: tl.constexpr,
    TILE: tl.constexpr, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Store the positions and x − μ of the k largest |x − μ|, (C, k), and what follows from them.

    Without a mean it follows from the differences, and the statistics are stored; with one, only
    what was selected. NaN counts as infinite: then the statistics are not finite, as they should.
    """
    C, S = in_elements(C, S, TILE)
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    present = channels < C
    if mean is None:
        centre = mean_from(x, differences, R, C, S, blocks, channels, present, TILE)
    else:
        centre = load_channels(mean, channels, present, 0.0)
    numbers = tl.arange(0, BLOCKS)[:, None]
    above = load_parts(highest, numbers, blocks, channels, present, C, 0.0, TILE) - centre
    below = centre - load_parts(lowest, numbers, blocks, channels, present, C, 0.0, TILE)
    heads = tl.where((numbers < blocks) & present, size_of(tl.maximum(above, below)), -1.0)
    last_size = tl.full((1, CHANNELS), float("inf"), tl.float32)
    last_position = tl.full((1, CHANNELS), -1, tl.int64)
    total = tl.zeros((1, CHANNELS), tl.float32)
    for rank in range(0, K):
        size = tl.max(heads, 0, keep_dims=True)
        number = tl.min(tl.where(heads == size, numbers, BLOCKS - 1), 0, keep_dims=True)
        position = tl.full((1, CHANNELS), 2**62, tl.int64)
        for first in range(0, span, ROWS):
            _, sizes, at = look_at(
                x, number, first, span, centre, channels, present, R, C, S, TILE, ROWS
            )
            left = (sizes < last_size) | ((sizes == last_size) & (at > last_position))
            found = tl.where(left & (sizes == size), at, 2**62)
            position = tl.minimum(position, tl.min(found, 0, keep_dims=True))
        rest = tl.full((1, CHANNELS), -1.0, tl.float32)
        for first in range(0, span, ROWS):
            _, sizes, at = look_at(
                x, number, first, span, centre, channels, present, R, C, S, TILE, ROWS
            )
            left = (sizes < size) | ((sizes == size) & (at > position))
            behind = tl.where(left, sizes, -1.0)
            rest = tl.maximum(rest, tl.max(behind, 0, keep_dims=True))
        heads = tl.where(numbers == number, rest, heads)
        last_size, last_position = size, position
        exists = size >= 0
        where = tl.where(exists, position, 0)
        there = tl.load(x + offsets_at(where, channels, C, S, TILE), mask=present, other=0.0)
        deviation = tl.where(exists, there.to(tl.float32) - centre, 0.0)
        tl.store(positions + channels * K + rank, where, mask=present)
        tl.store(deviations + channels * K + rank, deviation, mask=present)
        total += tl.where(exists, size, 0.0)
    if mean is None:
        finish_statistics(
            statistics, running_mean, running_var, batches, momentum, centre,
            tl.div_rn(total, K + tl.zeros_like(total)), weight, constant, eps, R, C, channels,
            present, tl.program_id(0) >= 0,
        )  # fmt: skip


@triton.jit
def look_at(
    x, number, first, span, centre, channels, present, R, C, S, TILE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Return x − μ, |x − μ| and positions of some rows of one block of each channel.

    |x − μ| is −1 where there is no element.
    """
    at = number.to(tl.int64) * span + first + tl.arange(0, ROWS)[:, None]
    mask = (at < R) & present
    offsets = offsets_at(at, channels, C, S, TILE)
    deviations = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) - centre
    return deviations, tl.where(mask, size_of(tl.abs(deviations)), -1.0), at


@triton.jit
def size_of(values):
    """Return the values, with infinity for NaN."""
    return tl.where(values == values, values, float("inf"))
