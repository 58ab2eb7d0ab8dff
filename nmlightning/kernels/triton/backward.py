"""The two passes of backward: the sums of a channel, then the gradient by x.

    ∂L/∂x = gain · g + offset − pull · s        for L1
    ∂L/∂x = gain · g + offset, less pull · s at the selected elements        for L∞ and Top(k)

with s = +1 where x > μ, else −1. g is what reaches the norm: `grad` where the ReLU let it pass.
That is known from y, or recomputed from x in the very arithmetic of forward. The first pass keeps
a code of each element for the second, which so need not read x: whether s = +1, and whether ReLU
let it pass where that is not known from y.
"""

import triton
import triton.language as tl

from nmlightning.kernels.triton.forward import apply_gain
from nmlightning.kernels.triton.tiles import (
    STAGES,
    begin,
    fill,
    load_channels,
    load_codes,
    offsets_at,
    place,
    store_codes,
    store_part,
    sum_parts,
    sum_tile,
)


@triton.jit
def sum_gradients(
    grad, x, y, passed, codes, mean, gain, bias, parts, R, C, S, tiles, blocks, TILE: tl.constexpr,
    RELU: tl.constexpr, SIGNS: tl.constexpr,
):  # fmt: skip
    """Store Σg, Σ g · (x − μ) and, if asked, Σs of each block; g and codes, if there is room."""
    C, S, column, block, channels, present = begin(C, S, TILE)
    centre = load_channels(mean, channels, present, 0.0)
    slope = load_channels(gain, channels, present, 1.0)
    shift = load_channels(bias, channels, present, 0.0)
    total, product, above = add_gradients(
        grad, x, y, passed, codes, centre, slope, shift, column, block, R, C, S, tiles,
        TILE, RELU, SIGNS,
    )  # fmt: skip
    size = C * blocks
    store_part(parts, total, block, blocks, channels, present, C, TILE)
    store_part(parts + size, product, block, blocks, channels, present, C, TILE)
    if SIGNS:
        store_part(parts + 2 * size, above, block, blocks, channels, present, C, TILE)


@triton.jit
def add_gradients(
    grad, x, y, passed, codes, mean, gain, shift, column, block, R, C, S, tiles, TILE: tl.constexpr,
    RELU: tl.constexpr, SIGNS: tl.constexpr,
):  # fmt: skip
    """Return Σg, Σ g · (x − μ) and, if asked, the number of x > μ in a block."""
    total = fill(0.0, TILE)
    product = fill(0.0, TILE)
    above = fill(0.0, TILE)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        number = block * tiles + tile
        offsets, mask, _ = place(number, column, R, C, S, TILE)
        values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        arriving = tl.load(grad + offsets, mask=mask, other=0.0)
        arriving, passes = let_pass(arriving, values, y, offsets, mask, mean, gain, shift, RELU)
        if passed is not None:
            tl.store(passed + offsets, arriving, mask=mask)
        wide = arriving.to(tl.float32)
        deviations = tl.where(mask, values - mean, 0.0)
        total += wide
        product += wide * deviations
        if SIGNS:
            above += tl.where(deviations > 0, 1.0, 0.0)
        if codes is not None:
            code = (deviations > 0).to(tl.int32)
            if RELU:
                code += tl.where(passes, 2, 0)
            store_codes(codes, code, number, column, R, C, S, TILE, 1 + RELU)
    return sum_tile(total, TILE), sum_tile(product, TILE), sum_tile(above, TILE)


@triton.jit
def let_pass(grad, values, y, offsets, mask, mean, gain, shift, RELU: tl.constexpr):
    """Return the gradient where the output of ReLU was positive, 0 elsewhere; and where it was.

    An output so small that it was rounded to 0 was not: the recomputed one is rounded, too.
    """
    passes = mask
    if y is not None:
        passes = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32) > 0
        grad = tl.where(passes, grad, tl.zeros_like(grad))
    elif RELU:
        passes = apply_gain(values, mean, gain, shift).to(grad.dtype).to(tl.float32) > 0
        grad = tl.where(passes, grad, tl.zeros_like(grad))
    return grad, passes


@triton.jit
def write_gradient(
    grad, x, y, passed, out, mean, gain, offset, pull, R, C, S, tiles, blocks, TILE: tl.constexpr
):
    """Store gain · g + offset − pull · s, without the last if there is no pull; and g, if asked."""
    C, S, column, block, channels, present = begin(C, S, TILE)
    centre = load_channels(mean, channels, present, 0.0)
    slope = load_channels(gain, channels, present, 1.0)
    constant = load_channels(offset, channels, present, 0.0)
    strength = load_channels(pull, channels, present, 0.0)
    write_gradient_tiles(
        grad, x, y, passed, None, out, centre, slope, centre, constant, strength, column, block,
        R, C, S, tiles, TILE, False, pull is not None,
    )  # fmt: skip


@triton.jit
def write_whole_gradient(
    grad, x, y, passed, codes, out, statistics, bias, parts, learned, positions, deviations,
    constant, part_blocks, R, C, S, tiles, blocks, TILE: tl.constexpr, RELU: tl.constexpr,
    K: tl.constexpr, SELECTED: tl.constexpr,
):  # fmt: skip
    """Do what `write_gradient` does, with all that belongs to a channel from the parts of its sums.

    Without parts there is one block, of which it takes the sums itself.

    The first program of a channel stores the gradients by weight and bias, (2, C). For Top(k), of
    which K is not 0, the selected elements of a block are written again after the block.
    """
    C, S, column, block, channels, present = begin(C, S, TILE)
    mean = load_channels(statistics, channels, present, 0.0)
    deviation = load_channels(statistics + 2 * C, channels, present, 1.0)
    scale = load_channels(statistics + 3 * C, channels, present, 0.0)
    gain = load_channels(statistics + 4 * C, channels, present, 1.0)
    shift = load_channels(bias, channels, present, 0.0)
    count = R.to(tl.float32)
    if parts is None:
        grad_bias, products, above = add_gradients(
            grad, x, y, None, None, mean, gain, shift, column, block, R, C, S, tiles,
            TILE, RELU, K == 0,
        )  # fmt: skip
    else:
        size = C * part_blocks
        grad_bias = sum_parts(parts, part_blocks, channels, present, C, TILE)
        products = sum_parts(parts + size, part_blocks, channels, present, C, TILE)
        if K == 0:
            above = sum_parts(parts + 2 * size, part_blocks, channels, present, C, TILE)
    grad_weight = tl.div_rn(products, deviation)
    writes = channels < tl.where(block == 0, C, 0)
    tl.store(learned + channels, grad_weight, mask=writes)
    tl.store(learned + C + channels, grad_bias, mask=writes)
    pull = gain * constant * tl.div_rn(scale, deviation) * grad_weight
    if K == 0:
        pull = tl.div_rn(pull, count)
        mean_sign = tl.div_rn(2.0 * above - count, count)
    else:
        pull = pull / K
        mean_sign = tl.div_rn(sum_signs(deviations, channels, present, K, SELECTED), count)
    offset = pull * mean_sign - tl.div_rn(gain * grad_bias, count)
    write_gradient_tiles(
        grad, x, y, passed, codes, out, mean, gain, shift, offset, pull, column, block,
        R, C, S, tiles, TILE, RELU, K == 0,
    )  # fmt: skip
    if K > 0:
        tl.debug_barrier()  # what follows overwrites what other threads have written
        span = tiles * TILE.HEIGHT if TILE.LAST else tiles * TILE.HEIGHT * TILE.WIDTH
        start = block.to(tl.int64) * span
        write_selected(
            grad, x, y, out, mean, gain, shift, offset, pull, positions, deviations,
            start, start + span, channels, present, C, S, TILE, RELU, K, SELECTED,
        )  # fmt: skip


@triton.jit
def write_gradient_tiles(
    grad, x, y, passed, codes, out, mean, gain, shift, offset, pull, column, block, R, C, S, tiles,
    TILE: tl.constexpr, RELU: tl.constexpr, SIGNS: tl.constexpr,
):  # fmt: skip
    """Write a block of the gradient, from its end; x is read where no codes say what it would."""
    for tile in tl.range(0, tiles, num_stages=STAGES):
        number = block * tiles + (tiles - 1 - tile)
        offsets, mask, _ = place(number, column, R, C, S, TILE)
        arriving = tl.load(grad + offsets, mask=mask, other=0.0)
        if codes is not None:
            code = load_codes(codes, number, column, R, C, S, TILE, 1 + RELU)
            above = code % 2 != 0
            if RELU:
                arriving = tl.where(code > 1, arriving, tl.zeros_like(arriving))
        else:
            values = fill(0.0, TILE)
            if SIGNS or RELU:
                values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
            arriving, _ = let_pass(arriving, values, y, offsets, mask, mean, gain, shift, RELU)
            above = values - mean > 0
        if passed is not None:
            tl.store(passed + offsets, arriving, mask=mask)
        result = arriving.to(tl.float32) * gain + offset
        if SIGNS:
            result -= tl.where(above, pull, -pull)
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
    grad, x, y, out, mean, gain, shift, offset, pull, positions, deviations, start, end, channels,
    present, C, S, TILE: tl.constexpr, RELU: tl.constexpr, K: tl.constexpr, SELECTED: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the selected elements that lie from `start` to `end`."""
    ranks = tl.arange(0, SELECTED)[:, None]
    mask = (ranks < K) & present
    at = tl.load(positions + channels * K + ranks, mask=mask, other=-1)
    selected = tl.load(deviations + channels * K + ranks, mask=mask, other=0.0)
    mask = mask & (at >= start) & (at < end)
    offsets = offsets_at(at, channels, C, S, TILE)
    arriving = tl.load(grad + offsets, mask=mask, other=0.0)
    values = selected + mean
    if RELU:
        values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    arriving, _ = let_pass(arriving, values, y, offsets, mask, mean, gain, shift, RELU)
    result = arriving.to(tl.float32) * gain + offset - tl.where(selected > 0, pull, -pull)
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=mask)
