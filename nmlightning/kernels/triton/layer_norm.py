"""L1 layer and RMS norms by Triton kernels: one launch forward, two backward.

Of each row (μ, 1/σ, c · ŝ/σ) is kept, (3, rows) float32; an RMS norm does not centre, its μ is 0.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmlightning.functional.batch_norm import differentiable
from nmlightning.functional.plain import plain_layer_norm
from nmlightning.functional.reductions import next_power_of_two
from nmlightning.kernels.triton.tiles import (
    HUGE,
    PROGRAMS_PER_PROCESSOR,
    VECTOR_BYTES,
    Launcher,
    on_device_of,
    processors_of,
)

TILE = 2048  # elements; a longer row is a tile, of which registers spill above 8,192 features
ELEMENTS_PER_THREAD = 8
FOLD = {"HEIGHT": 64, "WIDTH": 32, "num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def normalise_rows(
    x, weight, bias, y, values, constant, eps, M, D,
    VECTOR: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """Store y = (x − μ) / σ · weight + bias and what backward needs of each row."""
    D = D * VECTOR
    rows, columns, here, there = place_rows(tl.program_id(0), M, D, HEIGHT, WIDTH)
    offsets = rows * D + columns
    wide = tl.load(x + offsets, mask=here & there, other=0.0).to(tl.float32)
    mean = tl.zeros((HEIGHT, 1), tl.float32)
    if CENTRED:
        # What differs from a row's first element: so a constant row has exactly its value as mean.
        origin = tl.load(x + rows * D, mask=here, other=0.0).to(tl.float32)
        differences = tl.where(here & there, wide - origin, 0.0)
        mean = origin + tl.sum(differences, 1, keep_dims=True) / D
    deviations = tl.where(here & there, wide - mean, 0.0)
    scale = tl.sum(tl.abs(deviations), 1, keep_dims=True) / D * constant
    total = tl.sqrt_rn(tl.fma(scale, scale, eps + tl.zeros_like(scale)))
    total = tl.where(scale > HUGE, scale, total)
    inverse = tl.div_rn(1.0 + tl.zeros_like(total), total)
    result = deviations * inverse
    if weight is not None:
        result *= tl.load(weight + columns, mask=there, other=0.0)
    if bias is not None:
        result += tl.load(bias + columns, mask=there, other=0.0)
    tl.store(y + offsets, result.to(y.dtype.element_ty), mask=here & there)
    tl.store(values + rows, mean, mask=here)
    tl.store(values + M + rows, inverse, mask=here)
    tl.store(values + M + M + rows, constant * scale * inverse, mask=here)


@triton.jit
def write_row_gradients(
    grad, x, weight, values, out, parts, M, D, tiles,
    VECTOR: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """Store the gradient by x and, if there is room, Σ g · x̂ and Σg of the rows of each program.

    ∂L/∂x = 1/σ · [h − mean h − c · (ŝ/σ) · mean(h x̂) · (s − mean s)],   h = weight · g
    """
    D = D * VECTOR
    program, programs = tl.program_id(0), tl.num_programs(0)
    products = tl.zeros((HEIGHT, WIDTH), tl.float32)
    totals = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for tile in range(0, tiles):
        number = program * tiles + tile
        rows, columns, here, there = place_rows(number, M, D, HEIGHT, WIDTH)
        mask, offsets = here & there, rows * D + columns
        wide = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        inner = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(values + rows, mask=here, other=0.0)
        inverse = tl.load(values + (M + rows), mask=here, other=0.0)
        pull = tl.load(values + (M + M + rows), mask=here, other=0.0)
        deviations = tl.where(mask, wide - mean, 0.0)
        normal = deviations * inverse
        if parts is not None:
            products += inner * normal
            totals += inner
        if weight is not None:
            inner *= tl.load(weight + columns, mask=there, other=0.0)
        signs = tl.where(deviations > 0, 1.0, -1.0)
        pull *= tl.sum(inner * normal, 1, keep_dims=True) / D
        result = inner - pull * signs
        if CENTRED:
            result = tl.where(mask, result, 0.0)
            result -= tl.sum(result, 1, keep_dims=True) / D
        tl.store(out + offsets, (result * inverse).to(out.dtype.element_ty), mask=mask)
    if parts is not None:
        columns = tl.arange(0, WIDTH)[None, :]
        total = tl.sum(products, 0, keep_dims=True)
        tl.store(parts + program * D + columns, total, mask=columns < D)
        total = tl.sum(totals, 0, keep_dims=True)
        tl.store(parts + (programs + program) * D + columns, total, mask=columns < D)


@triton.jit
def fold_parts(parts, learned, D, programs, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Store the sum over the programs of (2, programs, D) parts, (2, D), in one order."""
    columns = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)[None, :]
    kind = tl.program_id(1)
    rows = tl.arange(0, HEIGHT)[:, None]
    total = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for first in range(0, programs, HEIGHT):
        mask = (first + rows < programs) & (columns < D)
        at = (kind * programs + first + rows) * D + columns
        total += tl.load(parts + at, mask=mask, other=0.0)
    tl.store(learned + kind * D + columns, tl.sum(total, 0, keep_dims=True), mask=columns < D)


@triton.jit
def place_rows(number, M, D, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Return the rows (HEIGHT, 1), int64, and columns (1, WIDTH) of a tile, and which exist."""
    rows = number.to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    return rows, columns, rows < M, columns < D


class TritonLayerNorm(torch.autograd.Function):
    """L1 layer norm, or RMS norm if not centred, of the last `rank` dimensions; y is contiguous."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None,
        rank: int, constant: float, eps: float, centred: bool,
    ) -> Tensor:  # fmt: skip
        features = x.shape[x.dim() - rank :].numel()
        y = torch.empty_like(rows := x.contiguous())
        values = x.new_empty(3, x.numel() // features, dtype=torch.float32)
        if x.numel():
            launch, _ = _divide(values.shape[1], features, x.element_size())
            learned = [None if q is None else q.float().resolve_neg() for q in (weight, bias)]
            with on_device_of(x):
                launch(normalise_rows, rows, *learned, y, values, constant, eps, CENTRED=centred)
        ctx.save_for_backward(x, weight, values)
        ctx.plain = (rank, 1.0, constant, eps, torch.float32, centred)
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        return y

    @staticmethod
    @differentiable(plain_layer_norm)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, values = ctx.saved_tensors
        rank, *_, centred = ctx.plain
        shape, learned = x.shape[x.dim() - rank :], weight is not None or ctx.bias is not None
        out = torch.empty_like(rows := x.contiguous())
        found = values.new_zeros(2, *shape)
        if x.numel():
            features, resident = shape.numel(), PROGRAMS_PER_PROCESSOR * processors_of(x.device)
            launch, programs = _divide(values.shape[1], features, x.element_size(), resident)
            parts = values.new_empty(2, programs, features) if learned else None
            scale = None if weight is None else weight.float().resolve_neg()
            arrays = (grad.resolve_neg().contiguous(), rows, scale, values, out, parts)
            with on_device_of(x):
                launch(write_row_gradients, *arrays, CENTRED=centred)
                if learned:
                    grid = (-(-features // FOLD["WIDTH"]), 2)
                    fold_parts[grid](parts, found, features, programs, **FOLD)
        by_weight = None if weight is None else found[0].to(weight.dtype)
        by_bias = None if ctx.bias is None else found[1].to(ctx.bias[1])
        return out, by_weight, by_bias, *(None,) * 4


@lru_cache(maxsize=4096)
def _divide(rows: int, features: int, item: int, resident: int = 0) -> tuple[Launcher, int]:
    """Return what launches a program for each tile, or at most `resident`; and how many."""
    width = next_power_of_two(features)
    height = max(1, TILE // width)
    constants = {
        "VECTOR": min(VECTOR_BYTES // item, features & -features),
        "HEIGHT": height,
        "WIDTH": width,
        "num_warps": max(1, min(32, height * width // (32 * ELEMENTS_PER_THREAD))),
    }
    numbers: tuple[int, ...] = (rows, features // constants["VECTOR"])
    programs = -(-rows // height)
    if resident:
        tiles = -(-programs // resident)
        programs, numbers = -(-programs // tiles), (*numbers, tiles)
    return Launcher((programs,), numbers, constants), programs
