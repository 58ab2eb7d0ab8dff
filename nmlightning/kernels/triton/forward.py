"""Triton kernels of the forward pass: L1's sums, y with its channel values, running statistics."""

import triton
import triton.language as tl

from nmlightning.kernels.triton.tiles import (
    HUGE,
    channels_of,
    first_of,
    load_channels,
    place,
    store_part,
    sum_parts,
    sum_tile,
)


@triton.jit
def sum_differences(
    x, parts, R, C, S, tiles, blocks,
    SPATIAL_VECTOR: tl.constexpr, CHANNEL_VECTOR: tl.constexpr, LAST: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store Σ(x − x₀) of each block; x₀ is the channel's first element.

    So a constant channel has exactly its value as mean, and a mean far from 0 costs no digits.
    """
    C, S = C * CHANNEL_VECTOR, S * SPATIAL_VECTOR
    column, block = tl.program_id(0), tl.program_id(1)
    channels, present = channels_of(column, C, LAST, WIDTH)
    origin = first_of(x, channels, present, S, LAST)
    total = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for tile in range(0, tiles):
        offsets, mask, _ = place(block * tiles + tile, column, R, C, S, LAST, HEIGHT, WIDTH, WIDE)
        values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        total += tl.where(mask, values - origin, 0.0)
    store_part(parts, sum_tile(total, LAST), block, blocks, channels, present, C, LAST)


@triton.jit
def sum_sizes(
    x, mean, differences, parts,
    R, C, S, tiles, blocks,
    SPATIAL_VECTOR: tl.constexpr, CHANNEL_VECTOR: tl.constexpr, LAST: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Store Σ|x − μ| of each block; μ is `mean`, or follows from the blocks' differences.

    It goes from the end to the beginning, where the previous pass has left the cache filled.
    """
    C, S = C * CHANNEL_VECTOR, S * SPATIAL_VECTOR
    column, block = tl.program_id(0), tl.program_id(1)
    channels, present = channels_of(column, C, LAST, WIDTH)
    if mean is None:
        centre = mean_from(x, differences, R, C, S, blocks, channels, present, LAST, FOLD)
    else:
        centre = load_channels(mean, channels, present, 0.0)
    total = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for tile in range(0, tiles):
        number = block * tiles + (tiles - 1 - tile)
        offsets, mask, _ = place(number, column, R, C, S, LAST, HEIGHT, WIDTH, WIDE)
        values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        total += tl.where(mask, tl.abs(values - centre), 0.0)
    store_part(parts, sum_tile(total, LAST), block, blocks, channels, present, C, LAST)


@triton.jit
def mean_from(
    x, differences, R, C, S, blocks, channels, present, LAST: tl.constexpr, FOLD: tl.constexpr
):
    """Return μ of each channel, from the parts of Σ(x − x₀)."""
    total = sum_parts(differences, blocks, channels, present, C, LAST, FOLD)
    return first_of(x, channels, present, S, LAST) + tl.div_rn(total, R.to(tl.float32))


@triton.jit
def finish_statistics(
    statistics, mean, magnitude, weight, constant, eps, R, C, channels, present, writes
):
    """Store μ, unbiased variance, σ, ŝ and the gain weight/σ of each channel; return the gain.

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
    x, residual, y, mean, gain, shift,
    R, C, S, tiles, blocks,
    SPATIAL_VECTOR: tl.constexpr, CHANNEL_VECTOR: tl.constexpr, LAST: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Store y = (x − μ) · gain + shift, plus the residual if there is one, through ReLU if asked.

    Without a mean it is x · gain + shift, without a shift nothing is added.
    """
    C, S = C * CHANNEL_VECTOR, S * SPATIAL_VECTOR
    column, block = tl.program_id(0), tl.program_id(1)
    channels, present = channels_of(column, C, LAST, WIDTH)
    centre = load_channels(mean, channels, present, 0.0)
    slope = load_channels(gain, channels, present, 1.0)
    offset = load_channels(shift, channels, present, 0.0)
    write_tiles(
        x, residual, y, centre, slope, offset, column, block, R, C, S, tiles,
        LAST, HEIGHT, WIDTH, WIDE, RELU,
    )  # fmt: skip


@triton.jit
def write_l1_output(
    x, residual, y, differences, sizes, statistics, weight, bias, constant, eps,
    R, C, S, tiles, blocks,
    SPATIAL_VECTOR: tl.constexpr, CHANNEL_VECTOR: tl.constexpr, LAST: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr,
    FOLD: tl.constexpr,
):  # fmt: skip
    """Do what `write_output` does, with μ and the gain from the parts of L1's sums.

    Every program folds all parts of its channels, in one order, and the first stores what follows.
    """
    C, S = C * CHANNEL_VECTOR, S * SPATIAL_VECTOR
    column, block = tl.program_id(0), tl.program_id(1)
    channels, present = channels_of(column, C, LAST, WIDTH)
    mean = mean_from(x, differences, R, C, S, blocks, channels, present, LAST, FOLD)
    total = sum_parts(sizes, blocks, channels, present, C, LAST, FOLD)
    gain = finish_statistics(
        statistics, mean, tl.div_rn(total, R.to(tl.float32)), weight, constant, eps,
        R, C, channels, present, block == 0,
    )  # fmt: skip
    shift = load_channels(bias, channels, present, 0.0)
    write_tiles(
        x, residual, y, mean, gain, shift, column, block, R, C, S, tiles,
        LAST, HEIGHT, WIDTH, WIDE, RELU,
    )  # fmt: skip


@triton.jit
def write_tiles(
    x, residual, y, mean, gain, shift, column, block,
    R, C, S, tiles,
    LAST: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
    RELU: tl.constexpr,
):  # fmt: skip
    """Write a block of y, with the values of its channels at hand."""
    for tile in range(0, tiles):
        offsets, mask, _ = place(block * tiles + tile, column, R, C, S, LAST, HEIGHT, WIDTH, WIDE)
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
    """Move both statistics, in channels where the batch's and the result are finite."""
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mask = channels < C
    new_mean = tl.load(mean + channels, mask=mask, other=0.0)
    new_variance = tl.load(variance + channels, mask=mask, other=0.0)
    mask = mask & is_finite(new_mean) & is_finite(new_variance)
    move(running_mean + channels, new_mean, momentum, mask)
    move(running_var + channels, new_variance, momentum, mask)
    if batches is not None:
        count = batches + tl.arange(0, 1)
        first = tl.arange(0, 1) == tl.program_id(0)
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
