"""Affine quantisation to 2 … 8 bits, as pure functions: ranges, grids, rounding, direction.

    N = 2^b − 1    s = (hi − lo)/N    z = round(−lo/s)    q = clamp(round(x/s) + z, 0, N)
    x̂ = (q − z) · s

The range [lo, hi] always contains 0, and z is whole, so that 0 is on the grid: padding with zeros
and a sum of integers mean the same in q as in x. All is computed in float32, or float64 for float64
tensors. What a grid is where s has no plain value is decided in `make_grid`.

Source: Banner et al. 2018 (arXiv 1805.11046).
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from nmlightning.errors import InputError

Rounding = Literal["nearest", "stochastic"]
BITS = range(2, 9)
_STREAM = 0x9E37  # 2^16 divided by the golden ratio, whose multiples fill a circle evenly


class Grid(NamedTuple):
    """The numbers (q − z) · s that q bits can say.

    Attributes:
        scale: s, a 0-dimensional tensor, or of a shape that broadcasts over what is quantised.
        zero_point: z, like it, whole.
        bits: b.
    """

    scale: Tensor
    zero_point: Tensor
    bits: int

    @property
    def levels(self) -> int:
        """Return N, the largest q."""
        return int(2**self.bits) - 1


def check_bits(what: str, bits: int) -> int:
    """Return `bits`, the setting called `what`, if it is whole and within 2 … 8."""
    if isinstance(bits, bool) or bits not in BITS:
        raise InputError(f"{what} is a whole number of 2 … 8, got {bits!r}.")
    return int(bits)


def extreme(x: Tensor, group: ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest of all values, on all ranks of a group; 0 of none."""
    if x.numel():
        ends = torch.stack([-x.amin(), x.amax()]).to(wide_dtype(x))
    else:
        ends = x.new_zeros(2, dtype=wide_dtype(x))
    if group is not None:
        ends = ends.nan_to_num(torch.inf, torch.inf, torch.inf)  # the largest of NaN is anything
        dist.all_reduce(ends, dist.ReduceOp.MAX, group)
    return -ends[0], ends[1]


def sample_mean(x: Tensor, group: ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """Return the mean over the samples (N, *) of their smallest and of their largest value.

    Over all ranks of a group; 0 of no samples. It leaves out about 2e-4 of Gaussian values.
    """
    if x.numel():
        dims = tuple(range(1, x.dim()))
        ends = [x.amin(dims), x.amax(dims)] if dims else [x, x]
        sums = torch.stack([end.to(wide_dtype(x)).sum() for end in ends])
    else:
        sums = x.new_zeros(2, dtype=wide_dtype(x))
    count = sums.new_tensor([float(len(x) if x.numel() else 0)])
    if group is not None:
        totals = torch.cat([sums, count])
        dist.all_reduce(totals, group=group)
        sums, count = totals[:2], totals[2:]
    low, high = sums / count.clamp(min=1)
    return low, high


def make_grid(low: Tensor, high: Tensor, bits: int) -> Grid:
    """Return the grid of a range, which is extended to contain 0.

    - Nothing but 0: s = 1, so that q = z.
    - s is at least the smallest normal number (1.2e-38 in float32), below which a device may read
      0: a range under 3e-36 has fewer steps, and no gradient above that is touched.
    - An end that is not finite: s is NaN, and so is all that is computed with it. Nothing is hidden
      from a GradScaler or from who looks for NaN.
    """
    steps = 2**bits - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = high / steps - low / steps  # the difference may be above the largest number
    scale = scale.clamp(min=torch.finfo(scale.dtype).tiny).where(scale > 0, 1.0)
    known = (low > -math.inf) & (high < math.inf)
    zero_point = torch.round(-low / scale).where(known, 0.0)
    return Grid(scale.where(known, torch.nan), zero_point, bits)


def symmetric_grid(weight: Tensor, bits: int, per_channel: bool = False) -> Grid:
    """Return the grid over ±max|w| of a weight (O, *), or of each output channel, (O, 1, …).

    z = 2^(b−1), so q − z is a signed integer of b bits and needs no other zero point.
    """
    dims = tuple(range(per_channel, weight.dim()))
    low, high = (end.to(wide_dtype(weight)) for end in _ends(weight.detach(), dims))
    limit = torch.maximum(-low, high)
    scale, _, _ = make_grid(-limit, limit, bits)
    return Grid(scale, torch.full_like(scale, 2 ** (bits - 1)), bits)


def _ends(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return x.amin(dims, keepdim=len(dims) < x.dim()), x.amax(dims, keepdim=len(dims) < x.dim())


def quantize(
    x: Tensor,
    grid: Grid,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
    stream: int = 0,
) -> Tensor:
    """Return q, uint8 like x.

    Args:
        x: any floating dtype and memory format.
        grid: of x's device.
        rounding: "nearest", of two equally near ones the even, or "stochastic", which adds u of
            [−½, ½), from 16 random bits, to x/s before that: E[x̂] = x between the grid's ends, of
            which one may lie half a step inside the range, and 0 stays 0.
        generator: of the random bits; by default torch's, whose state a checkpoint may keep.
        stream: shifts u. Ranks with one seed draw other numbers each by giving their rank.
    """
    steps = x.to(grid.scale.dtype) / grid.scale
    if rounding == "stochastic":
        steps.add_(_random_bits(steps, generator, stream), alpha=2**-16)
    return steps.round_().add_(grid.zero_point).clamp_(0, grid.levels).to(torch.uint8)


def _random_bits(like: Tensor, generator: torch.Generator | None, stream: int) -> Tensor:
    """Return uniform int16 like a dense tensor, by its layout; eager code draws four at once."""
    if torch.compiler.is_compiling():
        bits = torch.randint_like(like, -(2**15), 2**15, dtype=torch.int16)
    else:
        drawn = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
        drawn.random_(-(2**63), None, generator=generator)
        bits = drawn.view(torch.int16)[: like.numel()].as_strided(like.shape, like.stride())
    return bits.add_((stream * _STREAM + 2**15) % 2**16 - 2**15) if stream else bits


def centre(q: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Return q − z, whole numbers of −255 … 255, in a dtype that holds them; bfloat16 does."""
    if dtype.is_floating_point:
        return q.to(dtype).sub_(grid.zero_point.to(dtype))
    return (q.to(torch.int16) - grid.zero_point.to(torch.int16)).to(dtype)


def dequantize(q: Tensor, grid: Grid) -> Tensor:
    """Return x̂ = (q − z) · s."""
    return (q.to(grid.scale.dtype) - grid.zero_point) * grid.scale


def direction_cosine(x: Tensor, grid: Grid) -> Tensor:
    """Return cos(x, x̂), float64: how much of its direction a tensor keeps. 1 where x is 0."""
    steps = (x.detach().to(grid.scale.dtype) / grid.scale).double()
    kept = quantize(x.detach(), grid).double() - grid.zero_point
    lengths = torch.linalg.vector_norm(steps) * torch.linalg.vector_norm(kept)
    cosine: Tensor = (steps * kept).sum() / lengths
    return cosine.where(steps.count_nonzero() > 0, 1.0)


def cosine_bound(bits: int, count: int) -> float:
    """Return 2^b / (2^b + √(ln n / 6)), the expected cosine of n Gaussian values at least."""
    return float(2**bits / (2**bits + math.sqrt(math.log(count) / 6)))


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that x is quantised in: float32 or wider."""
    return torch.promote_types(x.dtype, torch.float32)
