"""Affine quantisation to 2 … 8 bits, as pure functions: ranges, grids, rounding, direction.

    N = 2^b − 1    s = (hi − lo)/N    z = round(−lo/s)    q = clamp(round(x/s) + z, 0, N)
    x̂ = (q − z) · s

The range [lo, hi] always contains 0, and z is whole, so that 0 is on the grid: padding with zeros
and a sum of integers mean the same in q as in x. All is computed in float32, or float64 for float64
tensors. What a grid is where s has no plain value is decided in `make_grid`.

Source: Banner et al. 2018 (arXiv 1805.11046).
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from nmlightning.errors import InputError, check_choice
from nmlightning.functional.reductions import is_transformed
from nmlightning.kernels.dispatch import quantizing_kernels

Rounding = Literal["nearest", "stochastic"]
BITS = range(2, 9)
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_GOLDEN = -0x61C8864680B583EB  # 2^64 divided by the golden ratio; signed, as all below
_STREAM = 0x2545F4914F6CDD1D  # no near multiple of it
_AT_ONCE = 2**20


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
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in BITS:
        raise InputError(f"{what} is a whole number of 2 … 8, got {bits!r}.")
    return bits


def by_kernel(name: str, x: Tensor, *arguments: Any) -> Tensor | None:
    """Return what a kernel in C++ makes of x; None where there is none, or it is not for that."""
    kernels = quantizing_kernels(x)
    return getattr(kernels, name)(x, *arguments) if kernels else None


def extreme(x: Tensor, group: ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest of all values, on all ranks of a group; 0 of none."""
    low, high = _ends(x) if x.numel() else x.new_zeros(2, dtype=wide_dtype(x))
    if group is not None:
        ends = torch.stack([-low, high])
        ends = ends.nan_to_num(torch.inf, torch.inf, torch.inf)  # the largest of NaN is anything
        dist.all_reduce(ends, dist.ReduceOp.MAX, group)
        low, high = -ends[0], ends[1]
    return low, high


def sample_mean(x: Tensor, group: ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """Return the mean over the samples (N, *) of their smallest and of their largest value.

    Over all ranks of a group; 0 of no samples. It leaves out about 2e-4 of Gaussian values.
    """
    ends = _ends(x, True) if x.numel() else x.new_zeros(2, 0, dtype=wide_dtype(x))
    # Float32 might not hold the sum; MPS has no float64.
    sums = ends.sum(1, dtype=ends.dtype if x.device.type == "mps" else torch.float64)
    count: Tensor | int = max(len(x), 1)
    if group is not None:
        own = sums.new_tensor([float(len(x) if x.numel() else 0)])
        totals = torch.cat([sums, own])
        dist.all_reduce(totals, group=group)
        sums, count = totals[:2], totals[2:].clamp(min=1)
    low, high = (sums / count).to(ends.dtype)
    return low, high


def _ends(x: Tensor, each: bool = False) -> Tensor:
    """Return the smallest and the largest value of x, (2,), or of each x[i], (2, N); wide."""
    if is_transformed(x) and not torch._C._is_tracing():
        raise InputError(
            "What computes in int8 is not for torch.func (vmap, grad, jvp), forward mode or "
            "is_grads_batched: loop over the samples or gradients, or call remove_int8 first."
        )
    if (found := by_kernel("ends", x, each)) is not None:
        return found
    rows = x.flatten(1) if each and x.dim() > 1 else x.unsqueeze(-1) if each else x.flatten()
    return torch.stack([rows.amin(-1), rows.amax(-1)]).to(wide_dtype(x))


def make_grid(low: Tensor, high: Tensor, bits: int) -> Grid:
    """Return the grid of a range, which is extended to contain 0.

    - Nothing but 0: s = 1, so that q = z.
    - s is at least the smallest normal number (1.2e-38 in float32), below which a device may read
      0: a range under 3e-36 has fewer steps, and no gradient above that is touched.
    - An end that is not finite: s is NaN, and so is all that is computed with it. Nothing is hidden
      from a GradScaler or from who looks for NaN.
    """
    steps = 2 ** check_bits("bits", bits) - 1
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
    low, high = _ends(weight.detach(), per_channel)
    limit = torch.maximum(-low, high)
    if per_channel:
        # A channel of zeros gets the least scale: s = 1 would outgrow all others' in backward.
        least = torch.where(limit == 0, torch.inf, limit).amin() if len(limit) else limit
        limit = torch.where((limit == 0) & (least < torch.inf), least, limit)
        limit = limit.view(-1, *[1] * (weight.dim() - 1))
    scale, _, _ = make_grid(-limit, limit, bits)
    return Grid(scale, torch.full_like(scale, 2 ** (bits - 1)), bits)


def quantize(
    x: Tensor,
    grid: Grid,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
    stream: int = 0,
    channels_last: bool | None = None,
) -> Tensor:
    """Return q, uint8 like x.

    Args:
        x: any floating dtype and memory format.
        grid: of x's device.
        rounding: "nearest", of two equally near ones the even, or "stochastic", which adds u of
            [−½, ½), from 16 random bits, to x/s before that: E[x̂] = x between the grid's ends, of
            which one may lie half a step inside the range, and 0 stays 0.
        generator: of the random bits; by default torch's, whose state a checkpoint may keep.
        stream: Ranks with one seed have other random numbers each by giving their rank.
        channels_last: how q is to lie in memory, if not like x.
    """
    check_choice("rounding", rounding, get_args(Rounding))
    bits = _random_bits(x, generator, stream) if rounding == "stochastic" else None
    numbers = grid.scale, grid.zero_point, grid.levels
    if (found := by_kernel("quantize", x, bits, *numbers, False, channels_last)) is not None:
        return found
    steps = x.to(grid.scale.dtype) / grid.scale
    if bits is not None:
        steps.add_(bits.as_strided(steps.shape, steps.stride()), alpha=2**-16)
    q = steps.round_().add_(grid.zero_point).clamp_(0, grid.levels).to(torch.uint8)
    return q if channels_last is None else lay_out(q, q.dtype, channels_last)


def _random_bits(x: Tensor, generator: torch.Generator | None, stream: int) -> Tensor:
    """Return a uniform int16 for each value of x, all of one draw by SplitMix64.

    Source: Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators.
    """
    if torch.compiler.is_compiling():
        seed = torch.randint(-(2**63), 2**63 - 1, (), device=x.device)
    else:
        seed = torch.empty((), dtype=torch.int64, device=x.device)
        seed.random_(-(2**63), None, generator=generator)
    seed.add_((stream * _STREAM + 2**63) % 2**64 - 2**63)
    if (found := by_kernel("random_bits", seed, x.numel())) is not None:
        return found
    z = torch.arange(1, -(-x.numel() // 4) + 1, device=x.device).mul_(_GOLDEN).add_(seed)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        z = z.bitwise_xor_((z >> shift).bitwise_and_(2 ** (64 - shift) - 1)).mul_(factor)
    return z.view(torch.int16)[: x.numel()]


def quantize_signed(weight: Tensor, grid: Grid) -> Tensor:
    """Return q − z, int8, of a weight by its symmetric grid; in memory with the channels last."""
    numbers = grid.scale, grid.zero_point, grid.levels
    if (found := by_kernel("quantize", weight, None, *numbers, True, True)) is not None:
        return found
    return lay_out(centre(quantize(weight, grid), grid, torch.int8), torch.int8, True)


def centre(q: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Return q − z, whole numbers of −255 … 255, in a dtype that holds them; bfloat16 does."""
    found = by_kernel("convert_elements", q, grid.zero_point, None, dtype, None)
    if found is not None:
        return found
    if dtype.is_floating_point:
        return q.to(dtype).sub_(grid.zero_point.to(dtype))
    return (q.to(torch.int16) - grid.zero_point.to(torch.int16)).to(dtype)


def lay_out(
    x: Tensor, dtype: torch.dtype, channels_last: bool, factor: Tensor | None = None
) -> Tensor:
    """Return x, times a factor, in a dtype, with the channels last in memory, or first."""
    memory_format = _CHANNELS_LAST.get(x.dim(), torch.contiguous_format)
    memory_format = memory_format if channels_last else torch.contiguous_format
    if factor is None and x.dtype == dtype and x.is_contiguous(memory_format=memory_format):
        return x
    found = by_kernel("convert_elements", x, None, factor, dtype, channels_last)
    if found is not None:
        return found
    y = x.to(dtype).contiguous(memory_format=memory_format)
    return y if factor is None else y * factor


def dequantize(q: Tensor, grid: Grid) -> Tensor:
    """Return x̂ = (q − z) · s."""
    numbers = grid.zero_point, grid.scale, grid.scale.dtype
    if (found := by_kernel("convert_elements", q, *numbers, None)) is not None:
        return found
    return (q.to(grid.scale.dtype) - grid.zero_point) * grid.scale


def direction_cosine(x: Tensor, grid: Grid) -> Tensor:
    """Return cos(x, x̂): how much of its direction a tensor keeps, rounded to nearest.

    1 where x is 0, and 0 where x̂ alone is. Accumulates in float64, or float32 on MPS, which has no
    other. On a grid with one scale it takes the memory of 2²⁰ values at once.
    """
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    x, sums = x.detach(), torch.zeros(3, dtype=dtype, device=x.device)
    for part in [x] if grid.scale.dim() else torch.split(x.flatten(), _AT_ONCE):
        steps = part.to(grid.scale.dtype) / grid.scale
        kept = quantize(part, grid).to(steps.dtype).sub_(grid.zero_point)
        if grid.scale.dim():
            relative = grid.scale / grid.scale.amax()
            steps, kept = steps * relative, kept * relative
        pairs = (steps, kept), (steps, steps), (kept, kept)
        sums += torch.stack([(a * b).sum(dtype=dtype) for a, b in pairs])
    product, given, rounded = sums
    lengths = (given.sqrt() * rounded.sqrt()).where(rounded != 0, 1.0)
    return torch.where(given != 0, product / lengths, 1.0)


def cosine_bound(bits: int, count: int) -> float:
    """Return 2^b / (2^b + √(ln n / 6)), the least expected cosine of n Gaussian values.

    By the paper; at 2 bits a draw may be lower.
    """
    return float(2**bits / (2**bits + math.sqrt(math.log(count) / 6)))


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that x is quantised in: float32 or wider."""
    return torch.promote_types(x.dtype, torch.float32)
