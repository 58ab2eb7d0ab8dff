"""The two passes of backward: the sums of a channel, then the gradient by x.

    ∂L/∂x = gain · g + offset − pull · s        for L1
    ∂L/∂x = gain · g + offset, less pull · s at the selected elements        for L∞ and Top(k)

with s = +1 where x > μ, else −1. g is what reaches the norm: `grad` where the ReLU let it pass.
That is known from y, or recomputed from x in the very arithmetic of forward.
"""

import triton
import triton.language as tl

from nmlightning.kernels.triton.forward import apply_gain
from nmlightning.kernels.triton.tiles import (
    channels_of,
    load_channels,
    offsets_at,
    place,
    store_part,
    sum_parts,
    sum_tile,
)


@triton.jit
def sum_gradients(
    grad, x, y, passed, mean, gain, bias, parts,
    R, C, S, tiles, blocks,
    SPATIAL_VECTOR: tl.constexpr, CHANNEL_VECTOR: tl.constexpr, LAST: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr,
    SIGNS: tl.constexpr,
):  # fmt: skip
    """Store Σg, Σ g · (x − μ) and, if asked, Σs of each block; and g itself, if there is room."""
    C, S = C * CHANNEL_VECTOR, S * SPATIAL_VECTOR
    column, block = tl.program_id(0), tl.program_id(1)
    channels, present = channels_of(column, C, LAST, WIDTH)
    centre = load_channels(mean, channels, present, 0.0)
    slope = load_channels(gain, channels, present, 1.0)
    shift = load_channels(bias, channels, present, 0.0)
    total = tl.zeros((HEIGHT, WIDTH), tl.float32)
    product = tl.zeros((HEIGHT, WIDTH), tl.float32)
    above = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for tile in range(0, tiles):
        offsets, mask, _ = place(block * tiles + tile, column, R, C, S, LAST, HEIGHT, WIDTH, WIDE)
        values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        arriving = tl.load(grad + offsets, mask=mask, other=0.0)
        arriving = let_pass(arriving, values, y, offsets, mask, centre, slope, shift, RELU)
        if passed is not None:
            tl.store(passed + offsets, arriving, mask=mask)
        wide = arriving.to(tl.float32)
        deviations = tl.where(mask, values - centre, 0.0)
        total += wide
        product += wide * deviations
        if SIGNS:
            above += tl.where(deviations > 0, 1.0, 0.0)
    size = C * blocks
    store_part(parts, sum_tile(total, LAST), block, blocks, channels, present, C, LAST)
    store_part(parts + size, sum_tile(product, LAST), block, blocks, channels, present, C, LAST)
    if SIGNS:
        store_part(
            parts + 2 * size, sum_tile(above, LAST), block, blocks, channels, present, C, LAST
        )


@triton.jit
def let_pass(grad, values, y, offsets, mask, mean, gain, shift, RELU: tl.constexpr):
    """Return the gradient where the output of ReLU was positive, 0 elsewhere.

    An output so small that it was rounded to 0 was not: the recomputed one is rounded, too.
    """
    if y is not None:
        output = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
        grad = tl.where(output > 0, grad, tl.zeros_like(grad))
    elif RELU:
        output = apply_gain(values, mean, gain, shift).to(grad.dtype).to(tl.float32)
        grad = tl.where(output > 0, grad, tl.zeros_like(grad))
    return grad


@triton.jit
def write_gradient(
    grad, x, y, passed, out, mean, gain, offset, pull,
    R, C, S, tiles, blocks,
    SPATIAL_VECTOR: tl.constexpr, CHANNEL_VECTOR: tl.constexpr, LAST: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store gain · g + offset − pull · s, without the last if there is no pull; and g, if asked."""
    C, S = C * CHANNEL_VECTOR, S * SPATIAL_VECTOR
    column, block = tl.program_id(0), tl.program_id(1)
    channels, present = channels_of(column, C, LAST, WIDTH)
    centre = load_channels(mean, channels, present, 0.0)
    slope = load_channels(gain, channels, present, 1.0)
    constant = load_channels(offset, channels, present, 0.0)
    strength = load_channels(pull, channels, present, 0.0)
    write_gradient_tiles(
        grad, x, y, passed, out, centre, slope, centre, constant, strength, column, block,
        R, C, S, tiles, LAST, HEIGHT, WIDTH, WIDE, False, pull is not None,
    )  # fmt: skip


@triton.jit
def write_whole_gradient(
    grad, x, out, statistics, bias, parts, learned, positions, deviations, constant,
    R, C, S, tiles, blocks, part_blocks,
    SPATIAL_VECTOR: tl.constexpr, CHANNEL_VECTOR: tl.constexpr, LAST: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr,
    FOLD: tl.constexpr, K: tl.constexpr, SELECTED: tl.constexpr,
):  # fmt: skip
    """Do what `write_gradient` does, with all that belongs to a channel from the parts of its sums.

    The first program of a channel stores the gradients by weight and bias, (2, C). For Top(k), of
    which K is not 0, the selected elements of a block are written again after the block.
    """
    C, S = C * CHANNEL_VECTOR, S * SPATIAL_VECTOR
    column, block = tl.program_id(0), tl.program_id(1)
    channels, present = channels_of(column, C, LAST, WIDTH)
    mean = load_channels(statistics, channels, present, 0.0)
    deviation = load_channels(statistics + 2 * C, channels, present, 1.0)
    scale = load_channels(statistics + 3 * C, channels, present, 0.0)
    gain = load_channels(statistics + 4 * C, channels, present, 1.0)
    shift = load_channels(bias, channels, present, 0.0)
    count = R.to(tl.float32)
    size = C * part_blocks
    grad_bias = sum_parts(parts, part_blocks, channels, present, C, LAST, FOLD)
    products = sum_parts(parts + size, part_blocks, channels, present, C, LAST, FOLD)
    grad_weight = tl.div_rn(products, deviation)
    writes = channels < tl.where(block == 0, C, 0)
    tl.store(learned + channels, grad_weight, mask=writes)
    tl.store(learned + C + channels, grad_bias, mask=writes)
    pull = gain * constant * tl.div_rn(scale, deviation) * grad_weight
    if K == 0:
        above = sum_parts(parts + 2 * size, part_blocks, channels, present, C, LAST, FOLD)
        pull = tl.div_rn(pull, count)
        mean_sign = tl.div_rn(2.0 * above - count, count)
    else:
        pull = pull / K
        mean_sign = tl.div_rn(sum_signs(deviations, channels, present, K, SELECTED), count)
    offset = pull * mean_sign - tl.div_rn(gain * grad_bias, count)
    write_gradient_tiles(
        grad, x, None, None, out, mean, gain, shift, offset, pull, column, block,
        R, C, S, tiles, LAST, HEIGHT, WIDTH, WIDE, RELU, K == 0,
    )  # fmt: skip
    if K > 0:
        tl.debug_barrier()  # what follows overwrites what other threads have written
        span = tiles * HEIGHT if LAST else tiles * HEIGHT * WIDTH
        start = block.to(tl.int64) * span
        write_selected(
            grad, x, out, mean, gain, shift, offset, pull, positions, deviations,
            start, start + span, channels, present, C, S, LAST, RELU, K, SELECTED,
        )  # fmt: skip


@triton.jit
def write_gradient_tiles(
    grad, x, y, passed, out, mean, gain, shift, offset, pull, column, block,
    R, C, S, tiles,
    LAST: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
    RELU: tl.constexpr, SIGNS: tl.constexpr,
):  # fmt: skip
    """Write a block of the gradient, from its end; x is read where it is needed only."""
    for tile in range(0, tiles):
        number = block * tiles + (tiles - 1 - tile)
        offsets, mask, _ = place(number, column, R, C, S, LAST, HEIGHT, WIDTH, WIDE)
        arriving = tl.load(grad + offsets, mask=mask, other=0.0)
        if SIGNS or RELU:
            values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        else:
            values = tl.zeros((HEIGHT, WIDTH), tl.float32)
        arriving = let_pass(arriving, values, y, offsets, mask, mean, gain, shift, RELU)
        if passed is not None:
            tl.store(passed + offsets, arriving, mask=mask)
        result = arriving.to(tl.float32) * gain + offset
        if SIGNS:
            result -= tl.where(values - mean > 0, pull, -pull)
        tl.store(out + offsets, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def sum_signs(deviations, channels, present, K: tl.constexpr, SELECTED: tl.constexpr):
    """Return Σs of the selected elements of each channel."""
    ranks = tl.arange(0, SELECTED)[:, None]
    mask = (ranks < K) & present
    selected = tl.load(deviations + channels * K + ranks, mask=mask, other=0.0)
    signs = tl.where(selected > 0, 1.0, -1.0)
    return tl.sum(tl.where(mask, signs, 0.0), 0, keep_dims=True)


@triton.jit
def write_selected(
    grad, x, out, mean, gain, shift, offset, pull, positions, deviations, start, end, channels,
    present, C, S,
    LAST: tl.constexpr, RELU: tl.constexpr, K: tl.constexpr, SELECTED: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the selected elements that lie from `start` to `end`."""
    ranks = tl.arange(0, SELECTED)[:, None]
    mask = (ranks < K) & present
    at = tl.load(positions + channels * K + ranks, mask=mask, other=-1)
    selected = tl.load(deviations + channels * K + ranks, mask=mask, other=0.0)
    mask = mask & (at >= start) & (at < end)
    offsets = offsets_at(at, channels, C, S, LAST)
    arriving = tl.load(grad + offsets, mask=mask, other=0.0)
    values = selected + mean
    if RELU:
        values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    arriving = let_pass(arriving, values, None, offsets, mask, mean, gain, shift, RELU)
    result = arriving.to(tl.float32) * gain + offset - tl.where(selected > 0, pull, -pull)
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=mask)
