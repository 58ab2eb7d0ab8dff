"""Tiles and partitions of a channel among the programs of a kernel, and where kernels are launched.

A tile is what a program has in flight at once. In NHWC it is `height` rows of `width` channels; in
NCHW it is `height` vectors of `width` elements of one channel. The division depends on the shape
and the device only, so that sums are always taken in the same order.

Per-channel values have the shape (1, channels of the tile), which is (1, 1) in NCHW.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmlightning.functional import statistics
from nmlightning.functional.reductions import next_power_of_two
from nmlightning.kernels.interface import layout_of

TILE_BYTES = 16_384  # in flight for a program, of all tensors that it reads
PROGRAMS_PER_PROCESSOR = 2  # all are resident at once, at up to 128 registers a thread
STAGES = tl.constexpr(3)  # tiles of a loop that are loaded or computed at once
SMALL_BYTES = 2**22  # of a tensor, below which many programs read more of sums than of it
SMALL_BLOCKS = 32
ALONE_BYTES = 2**16  # of a column of tiles, which one program reads sooner than it is launched
LINE_BYTES = 128  # of the L2 cache; a row of a tile in NHWC is one
VECTOR_BYTES = 16  # the widest load
MAX_BLOCKS = 2048  # of a channel, whose extremes one program looks through
MIN_HEIGHT = 32
MIN_VECTORS = 128  # of a block to select from in NCHW
ROWS_AT_ONCE = 2048  # of a block
SELECTED_TOGETHER = 4  # channels in NHWC, whose extremes lie together
HUGE = tl.constexpr(statistics.HUGE)
WIDE_FROM = 2**30  # elements; from there on offsets are int64


class Launcher:
    """Launches kernels on a grid, with numbers and constants behind the arguments that they get.

    It keeps what Triton compiled, by all that differs from launch to launch: Triton takes four
    times as long to find that. Dtypes follow from the first argument's, and floats do not matter.
    """

    def __init__(self, grid: tuple[int, ...], numbers: tuple[int, ...], constants: Any) -> None:
        self._grid = (*grid, 1, 1)[:3]
        self._numbers = numbers
        self._constants = {"enable_fp_fusion": True, **constants}
        self._compiled: dict[Any, tuple[Any, ...]] = {}

    def __call__(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        first = arguments[0]
        kinds = [
            q.data_ptr() & 15 if isinstance(q, Tensor) else None if isinstance(q, float) else q
            for q in arguments
        ]
        key = (kernel.fn, first.dtype, first.device, *kinds, *constants.values())
        found = self._compiled.get(key)
        if found is not None:
            return found[0](*arguments, *found[1])  # type: ignore[no-any-return]
        known = {*kernel.arg_names, "num_warps", "enable_fp_fusion"}
        given = {k: v for k, v in {**self._constants, **constants}.items() if k in known}
        compiled = kernel[self._grid](*arguments, *self._numbers, **given)
        if compiled is not None:  # as where kernels are interpreted
            rest = [given[name] for name in kernel.arg_names if name in given]
            self._compiled[key] = compiled[self._grid], (*self._numbers, *rest)
        return None


class Tile(NamedTuple):
    """What a kernel is compiled for; see `Partition`."""

    LAST: bool
    HEIGHT: int
    WIDTH: int
    WIDE: bool  # whether offsets are int64
    FOLD: int
    VECTOR: int


@dataclass(frozen=True)
class Partition:
    """The kernels' arguments and compile-time constants that depend on the shape."""

    rows: int  # elements of a channel, N · spatial
    channels: int  # C
    spatial: int  # elements of a channel that lie together in NCHW
    blocks: int  # programs along a channel
    tiles: int  # that each of them goes through
    height: int  # of a tile, a power of 2
    width: int  # of a tile, a power of 2
    vector: int  # elements that are surely aligned with each other, a power of 2
    channels_last: bool  # whether the layout is NHWC

    @property
    def grid(self) -> tuple[int, int]:
        """Programs along the channels and along a channel."""
        columns = self.width if self.channels_last else 1
        return -(-self.channels // columns), self.blocks

    @property
    def constants(self) -> dict[str, Any]:
        """The compile-time constant that every kernel has, and the size of a program."""
        return {
            "TILE": Tile(
                LAST=self.channels_last,
                HEIGHT=self.height,
                WIDTH=self.width,
                WIDE=self.rows * self.channels >= WIDE_FROM,
                FOLD=self.fold,
                VECTOR=self.vector,
            ),
            "num_warps": min(8, max(1, self.height * self.width // 256)),
        }

    @property
    def fold(self) -> int:
        """The number of parts of a channel that a program adds at once."""
        return 64 if self.channels_last else 256

    @property
    def span(self) -> int:
        """Elements of a channel for each program."""
        return self.tiles * self.height * (1 if self.channels_last else self.width)

    @cached_property
    def launch(self) -> Launcher:
        """Launches kernels that go through the tensor."""
        return Launcher(self.grid, self.sizes, self.constants)

    @cached_property
    def launch_selection(self) -> Launcher:
        """Launches programs that each look through all blocks of some channels."""
        together = self._selected_together
        constants = {
            **self.constants,
            "CHANNELS": together,
            "BLOCKS": next_power_of_two(self.blocks),
            "ROWS": min(ROWS_AT_ONCE, self.span),
            "num_warps": 8,
        }
        rows, channels, spatial, _, blocks = self.sizes
        sizes = rows, channels, spatial, self.span, blocks
        return Launcher((-(-self.channels // together),), sizes, constants)

    @property
    def _selected_together(self) -> int:
        return min(SELECTED_TOGETHER, next_power_of_two(self.channels)) if self.channels_last else 1

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """The arguments of every kernel: rows, channels and spatial in vectors, tiles, blocks."""
        if self.channels_last:
            channels, spatial = self.channels // self.vector, self.spatial
        else:
            channels, spatial = self.channels, self.spatial // self.vector
        return self.rows, channels, spatial, self.tiles, self.blocks


def divide(x: Tensor, streams: int) -> Partition:
    """Return the partition of x for a kernel that reads so many tensors like it."""
    return _divide(*_describe(x), streams, processors_of(x.device))


def divide_to_select(x: Tensor) -> Partition:
    """Return a partition of x into few enough blocks to look through their extremes."""
    return _divide_to_select(*_describe(x))


@lru_cache(maxsize=64)
def processors_of(device: torch.device) -> int:
    """Return how many multiprocessors a device has; 2 on a CPU, where Triton is interpreted."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _describe(x: Tensor) -> tuple[int, int, int, bool, int]:
    spatial = x.shape[2:].numel()
    channels_last = spatial == 1 or layout_of(x) == "NHWC"
    return x.shape[0] * spatial, x.shape[1], spatial, channels_last, x.element_size()


@lru_cache(maxsize=4096)
def _divide(
    rows: int, channels: int, spatial: int, channels_last: bool, item: int, streams: int,
    processors: int,
) -> Partition:  # fmt: skip
    vector, width = _vector_and_width(channels, spatial, channels_last, item)
    columns = -(-channels // width) if channels_last else channels
    step = 1 if channels_last else width  # elements of a channel in a unit of height
    wanted = max(1, PROGRAMS_PER_PROCESSOR * processors // columns)
    if rows * channels * item < SMALL_BYTES:
        wanted = min(wanted, SMALL_BLOCKS)
    if rows * (width if channels_last else 1) * item <= ALONE_BYTES:
        wanted = 1
    enough = _at_most(max(1, rows // (wanted * step)))
    height = min(_at_most(TILE_BYTES // (item * streams * width)), max(MIN_HEIGHT, enough))
    tiles = -(-rows // (wanted * height * step))
    blocks = -(-rows // (tiles * height * step))
    return Partition(rows, channels, spatial, blocks, tiles, height, width, vector, channels_last)


@lru_cache(maxsize=4096)
def _divide_to_select(
    rows: int, channels: int, spatial: int, channels_last: bool, item: int
) -> Partition:
    vector, width = _vector_and_width(channels, spatial, channels_last, item)
    step = 1 if channels_last else width
    least = MIN_HEIGHT if channels_last else MIN_VECTORS * step
    span = max(least, next_power_of_two(-(-rows // MAX_BLOCKS)))
    height = min(span // step, _at_most(TILE_BYTES // (2 * item * width)))  # three sums each
    tiles, blocks = span // (height * step), -(-rows // span)
    return Partition(rows, channels, spatial, blocks, tiles, height, width, vector, channels_last)


def _vector_and_width(
    channels: int, spatial: int, channels_last: bool, item: int
) -> tuple[int, int]:
    contiguous = channels if channels_last else spatial
    vector = min(VECTOR_BYTES // item, contiguous & -contiguous)
    if not channels_last:
        return vector, vector
    return vector, min(LINE_BYTES // item, next_power_of_two(channels))


def _at_most(count: int) -> int:
    """Return the largest power of two that is not above `count`."""
    return 1 << (count.bit_length() - 1)


@triton.jit
def place(number, column, R, C, S, TILE: tl.constexpr, VECTOR: tl.constexpr = 1):
    """Return offsets, mask and positions of a tile, (HEIGHT, WIDTH) each.

    `number` counts the tiles along a channel, `column` those along the channels. A position counts
    along (N, *spatial) of a channel. With a VECTOR they are those of vectors of so many elements.
    """
    WIDTH: tl.constexpr = TILE.WIDTH // VECTOR
    down = tl.arange(0, TILE.HEIGHT)[:, None]
    along = tl.arange(0, WIDTH)[None, :]
    if TILE.WIDE:
        number = number.to(tl.int64)
    if TILE.LAST:
        C = C // VECTOR
        rows = number * TILE.HEIGHT + down
        channels = column * WIDTH + along
        offsets = rows * C + channels
        mask = (rows < R) & (channels < C)
        positions = rows + 0 * along
    else:
        R, S = R // VECTOR, S // VECTOR
        rows = (number * TILE.HEIGHT + down) * WIDTH  # a vector lies within one (N, C) plane
        batch = rows // S
        offsets = (batch * C + column) * S + (rows - batch * S) + along
        mask = (rows < R) & (along >= 0)
        positions = rows + along
    return offsets, mask, positions


@triton.jit
def offsets_at(positions, channels, C, S, TILE: tl.constexpr):
    """Return the offsets of single elements, by position and channel."""
    if TILE.LAST:
        offsets = positions * C + channels
    else:
        batch = positions // S
        offsets = (batch * C + channels.to(tl.int64)) * S + (positions - batch * S)
    return offsets


@triton.jit
def begin(C, S, TILE: tl.constexpr):
    """Return sizes from those in vectors, the program's column and block, its channels (1, C′).

    And which of these exist.
    """
    C, S = in_elements(C, S, TILE)
    column, block = tl.program_id(0), tl.program_id(1)
    if TILE.LAST:
        channels = column * TILE.WIDTH + tl.arange(0, TILE.WIDTH)[None, :]
    else:
        channels = column + tl.arange(0, 1)[None, :]
    return C, S, column, block, channels, channels < C


@triton.jit
def in_elements(C, S, TILE: tl.constexpr):
    """Return the sizes, of which the one that lies together is given in vectors."""
    return (C * TILE.VECTOR, S) if TILE.LAST else (C, S * TILE.VECTOR)


@triton.jit
def fill(value, TILE: tl.constexpr):
    """Return a tile of one value."""
    HEIGHT: tl.constexpr = TILE.HEIGHT
    WIDTH: tl.constexpr = TILE.WIDTH
    return tl.full((HEIGHT, WIDTH), value, tl.float32)


@triton.jit
def sum_tile(tile, TILE: tl.constexpr):
    """Return the sum of each channel of a tile."""
    if not TILE.LAST:
        tile = tl.sum(tile, 1, keep_dims=True)
    return tl.sum(tile, 0, keep_dims=True)


@triton.jit
def max_tile(tile, TILE: tl.constexpr):
    """Return the maximum of each channel of a tile."""
    if not TILE.LAST:
        tile = tl.max(tile, 1, keep_dims=True)
    return tl.max(tile, 0, keep_dims=True)


@triton.jit
def store_part(parts, values, block, blocks, channels, present, C, TILE: tl.constexpr):
    """Store what a program has found of its channels: in NCHW parts of a channel lie together."""
    if TILE.LAST:
        tl.store(parts + block * C + channels, values, mask=present)
    else:
        tl.store(parts + channels * blocks + block, values, mask=present)


@triton.jit
def load_parts(parts, rows, blocks, channels, present, C, other, TILE: tl.constexpr):
    """Return some of the parts of each channel, (rows, channels)."""
    mask = (rows < blocks) & present
    if TILE.LAST:
        values = tl.load(parts + rows * C + channels, mask=mask, other=other)
    else:
        values = tl.load(parts + channels * blocks + rows, mask=mask, other=other)
    return values


@triton.jit
def sum_parts(parts, blocks, channels, present, C, TILE: tl.constexpr):
    """Return the sum of the parts of each channel, always in the same order."""
    rows = tl.arange(0, TILE.FOLD)[:, None]
    total = load_parts(parts, rows, blocks, channels, present, C, 0.0, TILE)
    for first in range(TILE.FOLD, blocks, TILE.FOLD):
        total += load_parts(parts, first + rows, blocks, channels, present, C, 0.0, TILE)
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
def first_of(x, channels, present, S, TILE: tl.constexpr):
    """Return the first element of each channel: sums are taken of what differs from it."""
    offsets = offsets_at(0 * channels, channels, 0, S, TILE)
    return tl.load(x + offsets, mask=present, other=0.0).to(tl.float32)


@triton.jit
def store_codes(codes, values, number, column, R, C, S, TILE: tl.constexpr, BITS: tl.constexpr):
    """Store values of so many bits, those of a vector in one integer."""
    at, mask, _ = place(number, column, R, C, S, TILE, TILE.VECTOR)
    HEIGHT: tl.constexpr = TILE.HEIGHT  # a field in a tuple is none for Triton 3.6
    VECTOR: tl.constexpr = TILE.VECTOR
    VECTORS: tl.constexpr = TILE.WIDTH // TILE.VECTOR
    shifts = BITS * tl.arange(0, VECTOR)[None, None, :]
    words = tl.sum(tl.reshape(values, (HEIGHT, VECTORS, VECTOR)) << shifts, 2)
    tl.store(codes + at, words.to(codes.dtype.element_ty), mask=mask)


@triton.jit
def load_codes(codes, number, column, R, C, S, TILE: tl.constexpr, BITS: tl.constexpr):
    """Return what `store_codes` has stored of a tile."""
    at, mask, _ = place(number, column, R, C, S, TILE, TILE.VECTOR)
    words = tl.load(codes + at, mask=mask, other=0).to(tl.int32)
    shifts = BITS * tl.arange(0, TILE.VECTOR)[None, None, :]
    HEIGHT: tl.constexpr = TILE.HEIGHT
    WIDTH: tl.constexpr = TILE.WIDTH
    return tl.reshape(words[:, :, None] >> shifts, (HEIGHT, WIDTH)) & ((1 << BITS) - 1)


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of x the current one: Triton launches there, on its current stream."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
