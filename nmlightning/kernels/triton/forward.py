"""Triton kernels of the forward pass: L1's sums, y with its channel values, running statistics."""

import triton
import triton.language as tl

from nmlightning.kernels.triton.tiles import (
    HUGE,
    STAGES,
    begin,
    first_of,
    load_channels,
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
    total = add_differences(x, origin, column, block, R, C, S, tiles, TILE)
    store_part(parts, total, block, blocks, channels, present, C, TILE)


@triton.jit
def add_differences(x, origin, column, block, R, C, S, tiles, TILE: tl.constexpr):
    """Return Σ(x − x₀) of a block."""
    total = tl.zeros((TILE.HEIGHT, TILE.WIDTH), tl.float32)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        offsets, mask, _ = place(block * tiles + tile, column, R, C, S, TILE)
        values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        total += tl.where(mask, values - origin, 0.0)
    return sum_tile(total, TILE)


@triton.jit
def sum_sizes(x, mean, differences, parts, R, C, S, tiles, blocks, TILE: tl.constexpr):
    """Store Σ|x − μ| of each block; μ is `mean`, or follows from the blocks' differences."""
    C, S, column, block, channels, present = begin(C, S, TILE)
    if mean is None:
        centre = mean_from(x, differences, R, C, S, blocks, channels, present, TILE)
    else:
        centre = load_channels(mean, channels, present, 0.0)
    total = add_sizes(x, centre, column, block, R, C, S, tiles, TILE)
    store_part(parts, total, block, blocks, channels, present, C, TILE)


@triton.jit
def add_sizes(x, centre, column, block, R, C, S, tiles, TILE: tl.constexpr):
    """Return Σ|x − μ| of a block, from its end, where the last pass has left the cache filled."""
    total = tl.zeros((TILE.HEIGHT, TILE.WIDTH), tl.float32)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        number = block * tiles + (tiles - 1 - tile)
        offsets, mask, _ = place(number, column, R, C, S, TILE)
        values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        total += tl.where(mask, tl.abs(values - centre), 0.0)
    return sum_tile(total, TILE)


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
    tl.store(statistics + channels, mean, mask=mask)
    tl.store(statistics + C + channels, variance, mask=mask)
    tl.store(statistics + 2 * C + channels, deviation, mask=mask)
    tl.store(statistics + 3 * C + channels, scale, mask=mask)
    tl.store(statistics + 4 * C + channels, gain, mask=mask)
    if running_mean is not None:
        move_both(running_mean, running_var, batches, momentum, mean, variance, channels, mask)
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
        total = add_differences(x, mean, column, block, R, C, S, tiles, TILE)
        mean += tl.div_rn(total, R.to(tl.float32))
        total = add_sizes(x, mean, column, block, R, C, S, tiles, TILE)
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
