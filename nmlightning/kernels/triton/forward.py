"""Triton kernels of forward: L1's sums, the k largest, y, statistics of the batch and running ones.

The k largest |x − μ| of a channel come in the order (largest first, then first position). One pass
stores the extremes of every block, and the sums that μ follows from: max|x − μ| = max(max x − μ,
μ − min x), so no second pass is needed. The k largest lie in the k blocks with the largest of
these; since blocks are in order, that holds with ties, too. So one program then takes, k times, the
first of the blocks with the largest |x − μ| that is left, and reads that block to find the element
and what is left of the block.
"""

import triton
import triton.language as tl

from nmlightning.kernels.triton.tiles import (
    HUGE,
    STAGES,
    begin,
    fill,
    first_of,
    in_elements,
    load_channels,
    load_parts,
    max_tile,
    offsets_at,
    place,
    store_part,
    sum_parts,
    sum_tile,
)


@triton.jit
def sum_differences(x, parts, R, C, S, tiles, blocks, TILE: tl.constexpr):
    """Store Σ(x − x₀) of each block; x₀ is the channel's first element.

    So a constant channel has exactly its value as mean, and a mean far from 0 costs no digits.
    """
    C, S, column, block, channels, present = begin(C, S, TILE)
    origin = first_of(x, channels, present, S, TILE)
    total = add_up(x, origin, column, block, R, C, S, tiles, TILE, False)
    store_part(parts, total, block, blocks, channels, present, C, TILE)


@triton.jit
def add_up(
    x, centre, column, block, R, C, S, tiles, TILE: tl.constexpr, SIZES: tl.constexpr
):  # fmt: skip
    """Return Σ(x − centre) of a block, or its sizes' Σ|x − centre|.

    The sizes are read from the block's end, where the last pass has left the cache filled.
    """
    total = fill(0.0, TILE)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        number = block * tiles + ((tiles - 1 - tile) if SIZES else tile)
        offsets, mask, _ = place(number, column, R, C, S, TILE)
        values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) - centre
        total += tl.where(mask, tl.abs(values) if SIZES else values, 0.0)
    return sum_tile(total, TILE)


@triton.jit
def sum_sizes(x, mean, differences, parts, R, C, S, tiles, blocks, TILE: tl.constexpr):
    """Store Σ|x − μ| of each block; μ is `mean`, or follows from the blocks' differences."""
    C, S, column, block, channels, present = begin(C, S, TILE)
    if mean is None:
        centre = mean_from(x, differences, R, C, S, blocks, channels, present, TILE)
    else:
        centre = load_channels(mean, channels, present, 0.0)
    total = add_up(x, centre, column, block, R, C, S, tiles, TILE, True)
    store_part(parts, total, block, blocks, channels, present, C, TILE)


@triton.jit
def mean_from(x, differences, R, C, S, blocks, channels, present, TILE: tl.constexpr):
    """Return μ of each channel, from the parts of Σ(x − x₀)."""
    total = sum_parts(differences, blocks, channels, present, C, TILE)
    return first_of(x, channels, present, S, TILE) + tl.div_rn(total, R.to(tl.float32))


@triton.jit
def finish_statistics(
    statistics, running_mean, running_var, batches, momentum, mean, magnitude, weight, constant,
    eps, R, C, channels, present, writes,
):  # fmt: skip
    """Store μ, unbiased variance, σ, ŝ and the gain weight/σ of each channel; return the gain.

    And move running statistics, if there are any, towards the first two.

    `statistics` is (5, C), and every kernel takes the gain from there, so that what follows from it
    is the same to the last bit. Only a program that `writes` stores anything.
    """
    mask = channels < tl.where(writes, C, 0)
    scale = magnitude * constant
    deviation = tl.where(scale > HUGE, scale, tl.sqrt_rn(tl.fma(scale, scale, eps)))
    gain = tl.div_rn(load_channels(weight, channels, present, 1.0), deviation)
    count = R.to(tl.float32)
    variance = scale * scale * tl.div_rn(count, count - 1)
    if running_mean is not None:
        move_both(running_mean, running_var, batches, momentum, mean, variance, channels, mask)
    tl.store(statistics + channels, mean, mask=mask)
    tl.store(statistics + C + channels, variance, mask=mask)
    tl.store(statistics + 2 * C + channels, deviation, mask=mask)
    tl.store(statistics + 3 * C + channels, scale, mask=mask)
    tl.store(statistics + 4 * C + channels, gain, mask=mask)
    return gain


@triton.jit
def apply_gain(x, mean, gain, shift):
    """Return (x − μ) · gain + shift in float32, by exactly these two roundings."""
    return tl.fma(x - mean, gain + tl.zeros_like(x), shift + tl.zeros_like(x))


@triton.jit
def relu(values):
    """Return max(values, 0), and NaN where there is NaN, as torch does."""
    return tl.maximum(values, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def write_output(
    x, residual, y, mean, gain, shift, R, C, S, tiles, blocks, TILE: tl.constexpr,
    RELU: tl.constexpr,
):  # fmt: skip
    """Store y = (x − μ) · gain + shift, plus the residual if there is one, through ReLU if asked.

    Without a mean it is x · gain + shift, without a shift nothing is added.
    """
    C, S, column, block, channels, present = begin(C, S, TILE)
    centre = load_channels(mean, channels, present, 0.0)
    slope = load_channels(gain, channels, present, 1.0)
    offset = load_channels(shift, channels, present, 0.0)
    write_tiles(x, residual, y, centre, slope, offset, column, block, R, C, S, tiles, TILE, RELU)


@triton.jit
def write_l1_output(
    x, residual, y, differences, sizes, statistics, running_mean, running_var, batches, weight,
    bias, momentum, constant, eps, R, C, S, tiles, blocks, TILE: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Do what `write_output` does, with μ and the gain from the parts of L1's sums.

    Every program folds all parts of its channels, in one order, and the first stores what follows.
    Without parts there is one block, of which it takes the sums itself.
    """
    C, S, column, block, channels, present = begin(C, S, TILE)
    if sizes is None:
        mean = first_of(x, channels, present, S, TILE)
        total = add_up(x, mean, column, block, R, C, S, tiles, TILE, False)
        mean += tl.div_rn(total, R.to(tl.float32))
        total = add_up(x, mean, column, block, R, C, S, tiles, TILE, True)
    else:
        mean = mean_from(x, differences, R, C, S, blocks, channels, present, TILE)
        total = sum_parts(sizes, blocks, channels, present, C, TILE)
    gain = finish_statistics(
        statistics, running_mean, running_var, batches, momentum, mean,
        tl.div_rn(total, R.to(tl.float32)), weight, constant, eps, R, C, channels, present,
        block == 0,
    )  # fmt: skip
    shift = load_channels(bias, channels, present, 0.0)
    write_tiles(x, residual, y, mean, gain, shift, column, block, R, C, S, tiles, TILE, RELU)


@triton.jit
def write_tiles(
    x, residual, y, mean, gain, shift, column, block, R, C, S, tiles, TILE: tl.constexpr,
    RELU: tl.constexpr,
):  # fmt: skip
    """Write a block of y, with the values of its channels at hand."""
    for tile in tl.range(0, tiles, num_stages=STAGES):
        offsets, mask, _ = place(block * tiles + tile, column, R, C, S, TILE)
        values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        values = apply_gain(values, mean, gain, shift)
        if residual is not None:
            values += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            values = relu(values)
        tl.store(y + offsets, values.to(y.dtype.element_ty), mask=mask)


@triton.jit
def move_statistics(
    running_mean, running_var, batches, mean, variance, momentum, C, CHANNELS: tl.constexpr
):
    """Do for ranks, whose statistics are shared, what `finish_statistics` does for one."""
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mean = tl.load(mean + channels, mask=channels < C, other=0.0)
    variance = tl.load(variance + channels, mask=channels < C, other=0.0)
    move_both(running_mean, running_var, batches, momentum, mean, variance, channels, channels < C)


@triton.jit
def move_both(running_mean, running_var, batches, momentum, mean, variance, channels, mask):
    """Move both statistics, in channels where the batch's and the result are finite; count it."""
    finite = mask & is_finite(mean) & is_finite(variance)
    move(running_mean + channels, mean, momentum, finite)
    move(running_var + channels, variance, momentum, finite)
    if batches is not None:
        count, first = batches + 0 * channels, mask & (channels == 0)
        tl.store(count, tl.load(count, mask=first, other=0) + 1, mask=first)


@triton.jit
def move(running, newest, momentum, mask):
    """Store the moved statistics where they are finite."""
    old = tl.load(running, mask=mask, other=0.0)
    moved = old + momentum * (newest - old)
    tl.store(running, moved, mask=mask & is_finite(moved))


@triton.jit
def is_finite(values):
    """Return where values are neither infinite nor NaN."""
    return tl.abs(values) < float("inf")


@triton.jit
def find_extremes(x, differences, highest, lowest, R, C, S, tiles, blocks, TILE: tl.constexpr):
    """Store Σ(x − x₀), max x and min x of each block."""
    C, S, column, block, channels, present = begin(C, S, TILE)
    origin = first_of(x, channels, present, S, TILE)
    total = fill(0.0, TILE)
    above = fill(float("-inf"), TILE)
    below = fill(float("-inf"), TILE)
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
