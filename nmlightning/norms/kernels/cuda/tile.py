"""What all kernels share: where a tile lies, and the sums of a channel.

Per-channel values have the shape (1, channels of the tile), which is (1, 1) in NCHW.
"""

import triton
import triton.language as tl


@triton.jit
def place(
    number,
    column,
    R,
    C,
    S,
    LAST: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Return offsets, mask and positions of a tile, (HEIGHT, WIDTH) each.

    `number` counts the tiles along a channel, `column` those along the channels. A position counts
    along (N, *spatial) of a channel.
    """
    down = tl.arange(0, HEIGHT)[:, None]
    along = tl.arange(0, WIDTH)[None, :]
    if WIDE:
        number = number.to(tl.int64)
    if LAST:
        rows = number * HEIGHT + down
        channels = column * WIDTH + along
        offsets = rows * C + channels
        mask = (rows < R) & (channels < C)
        positions = rows + 0 * along
    else:
        rows = (number * HEIGHT + down) * WIDTH  # a vector lies within one (N, C) plane
        batch = rows // S
        offsets = (batch * C + column) * S + (rows - batch * S) + along
        mask = (rows < R) & (along >= 0)
        positions = rows + along
    return offsets, mask, positions


@triton.jit
def offsets_at(positions, channels, C, S, LAST: tl.constexpr):
    """Return the offsets of single elements, by position and channel."""
    if LAST:
        offsets = positions * C + channels
    else:
        batch = positions // S
        offsets = (batch * C + channels) * S + (positions - batch * S)
    return offsets


@triton.jit
def channels_of(column, C, LAST: tl.constexpr, WIDTH: tl.constexpr):
    """Return the channels of a column of tiles and which of them exist, (1, channels)."""
    if LAST:
        channels = column * WIDTH + tl.arange(0, WIDTH)[None, :]
    else:
        channels = column + tl.arange(0, 1)[None, :]
    return channels, channels < C


@triton.jit
def sum_tile(tile, LAST: tl.constexpr):
    """Return the sum of each channel of a tile."""
    if not LAST:
        tile = tl.sum(tile, 1, keep_dims=True)
    return tl.sum(tile, 0, keep_dims=True)


@triton.jit
def max_tile(tile, LAST: tl.constexpr):
    """Return the maximum of each channel of a tile."""
    if not LAST:
        tile = tl.max(tile, 1, keep_dims=True)
    return tl.max(tile, 0, keep_dims=True)


@triton.jit
def store_part(parts, values, block, blocks, channels, present, C, LAST: tl.constexpr):
    """Store what a program has found of its channels: in NCHW parts of a channel lie together."""
    if LAST:
        tl.store(parts + block * C + channels, values, mask=present)
    else:
        tl.store(parts + channels * blocks + block, values, mask=present)


@triton.jit
def load_parts(parts, rows, blocks, channels, present, C, other, LAST: tl.constexpr):
    """Return some of the parts of each channel, (rows, channels)."""
    mask = (rows < blocks) & present
    if LAST:
        values = tl.load(parts + rows * C + channels, mask=mask, other=other)
    else:
        values = tl.load(parts + channels * blocks + rows, mask=mask, other=other)
    return values


@triton.jit
def sum_parts(parts, blocks, channels, present, C, LAST: tl.constexpr, HEIGHT: tl.constexpr):
    """Return the sum of the parts of each channel, always in the same order."""
    rows = tl.arange(0, HEIGHT)[:, None]
    total = load_parts(parts, rows, blocks, channels, present, C, 0.0, LAST)
    for first in range(HEIGHT, blocks, HEIGHT):
        total += load_parts(parts, first + rows, blocks, channels, present, C, 0.0, LAST)
    return tl.sum(total, 0, keep_dims=True)


@triton.jit
def load_channels(values, channels, present, other):
    """Return values (C,) of the channels of a tile, or `other` where there are none."""
    if values is None:
        loaded = tl.full(channels.shape, other, tl.float32)
    else:
        loaded = tl.load(values + channels, mask=present, other=other)
    return loaded


@triton.jit
def first_of(x, channels, present, S, LAST: tl.constexpr):
    """Return the first element of each channel: sums are taken of what differs from it."""
    if LAST:
        values = tl.load(x + channels, mask=present, other=0.0)
    else:
        values = tl.load(x + channels * S, mask=present, other=0.0)
    return values.to(tl.float32)
