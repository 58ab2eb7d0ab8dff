"""The sums that L1's statistics are: Σ(x − x₀), then Σ|x − μ|, in parts."""

import triton
import triton.language as tl

from nmlightning.norms.kernels.cuda.tile import (
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
    x,
    parts,
    R,
    C,
    S,
    tiles,
    blocks,
    SPATIAL_VECTOR: tl.constexpr,
    CHANNEL_VECTOR: tl.constexpr,
    LAST: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):
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
    x,
    mean,
    differences,
    parts,
    R,
    C,
    S,
    tiles,
    blocks,
    SPATIAL_VECTOR: tl.constexpr,
    CHANNEL_VECTOR: tl.constexpr,
    LAST: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    FOLD: tl.constexpr,
):
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
