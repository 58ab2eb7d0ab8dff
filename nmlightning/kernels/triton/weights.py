"""Norms of the channels of many weights at once, and the weights normalised to them.

All weights are copied one after the other; `table` has where each row, a channel, begins in that,
its length and its p. A launch each way then takes a program for each row of all weights.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmlightning.functional.reductions import next_power_of_two
from nmlightning.kernels.triton.tiles import Launcher, on_device_of

LONGEST = 1024  # elements of a row at once


@triton.jit
def normalise_rows(flat, table, norms, scales, w, BLOCK: tl.constexpr):
    """Store ‖v‖_p of a row and, if there is room, s · v / ‖v‖_p, which is 0 where the norm is."""
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    start, length = tl.load(table + 3 * row), tl.load(table + 3 * row + 1).to(tl.int32)
    p = tl.load(table + 3 * row + 2)  # 0 for infinity
    sizes, squares = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    most = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, length, BLOCK):
        v = tl.load(flat + start + first + columns, mask=first + columns < length, other=0.0)
        sizes, squares, most = sizes + tl.abs(v), squares + v * v, tl.maximum(most, tl.abs(v))
    total, largest = tl.sum(sizes, 0), tl.max(most, 0)
    largest = tl.where(total == total, largest, total)  # a maximum passes over NaN
    norm = tl.where(p == 1, total, tl.where(p == 2, tl.sqrt_rn(tl.sum(squares, 0)), largest))
    tl.store(norms + row, norm)
    if w is not None:
        scale, spared = tl.load(scales + row) * (norm != 0), tl.where(norm == 0, 1.0, norm)
        for first in range(0, length, BLOCK):
            mask, at = first + columns < length, start + first + columns
            v = tl.load(flat + at, mask=mask, other=0.0)
            tl.store(w + at, v / spared * scale, mask=mask)


@triton.jit
def write_row_gradients(grads, flat, table, norms, scales, dv, ds, BLOCK: tl.constexpr):
    """Store ds = ⟨dw, v⟩ / n and dv = s/n · (dw − ds · ∂n/∂v) of a row, for the first largest."""
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    start, length = tl.load(table + 3 * row), tl.load(table + 3 * row + 1).to(tl.int32)
    p, norm = tl.load(table + 3 * row + 2), tl.load(norms + row)
    products, found = tl.zeros((BLOCK,), tl.float32), tl.full((BLOCK,), 2**31 - 1, tl.int32)
    for first in range(0, length, BLOCK):
        mask, at = first + columns < length, start + first + columns
        v = tl.load(flat + at, mask=mask, other=0.0)
        products += tl.load(grads + at, mask=mask, other=0.0) * v
        is_largest = mask & (tl.abs(v) == norm)
        found = tl.minimum(found, tl.where(is_largest, first + columns, 2**31 - 1))
    spared, where = tl.where(norm == 0, 1.0, norm), tl.min(found, 0)
    dot = tl.sum(products, 0) / spared
    scale = tl.load(scales + row) * (norm != 0)
    tl.store(ds + row, dot)
    for first in range(0, length, BLOCK):
        mask, at = first + columns < length, start + first + columns
        v = tl.load(flat + at, mask=mask, other=0.0)
        slope = tl.where(v > 0, 1.0, tl.where(v < 0, -1.0, 0.0))
        slope = tl.where((p == 1) | (first + columns == where), slope, 0.0)
        slope = tl.where(p == 2, v / spared, slope)
        gradient = tl.load(grads + at, mask=mask, other=0.0) - dot * slope
        tl.store(dv + at, gradient / spared * scale, mask=mask)


@lru_cache(maxsize=64)
def _tables(
    shapes: tuple[tuple[int, int], ...], ps: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Launcher]:
    """Return the table, (rows, 3) int64, and what launches a program for each row."""
    lines, start = [], 0
    for (rows, length), p in zip(shapes, ps, strict=True):
        lines += [[start + row * length, length, 0 if p == math.inf else p] for row in range(rows)]
        start += rows * length
    block = min(LONGEST, next_power_of_two(max(length for _, length in shapes)))
    table = torch.tensor(lines, dtype=torch.int64, device=device)
    return table, Launcher((len(lines),), (), {"BLOCK": block, "num_warps": max(1, block // 256)})


def _gather(rows: Sequence[Tensor], ps: Sequence[float]) -> tuple[Tensor, Tensor, Launcher]:
    shapes = tuple((_channels(v), v.numel() // _channels(v)) for v in rows)
    flat = torch.cat([_in_memory(v.detach(), v).reshape(-1) for v in rows])
    return flat, *_tables(shapes, tuple(ps), flat.device)


def _scatter(flat: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of a result, each as its weight is, and with a version of its own."""
    parts = zip(flat.split([v.numel() for v in rows]), rows, strict=True)
    turned = [(part.data.view(_in_memory(v, v).shape), v) for part, v in parts]
    return [part.movedim(-1, 1) if _is_turned(v) else part for part, v in turned]


def _in_memory(x: Tensor, like: Tensor) -> Tensor:
    return x.movedim(1, -1) if _is_turned(like) else x


def _is_turned(v: Tensor) -> bool:
    """Return whether the weight is in channels_last."""
    return v.dim() > 2 and not v.is_contiguous() and v.movedim(1, -1).is_contiguous()


def _channels(v: Tensor) -> int:
    return len(v) if v.dim() > 1 else 1


def _are_alike(tensors: Sequence[Tensor]) -> bool:
    kinds = {(q.dtype, q.device, q.is_inference(), q.is_neg()) for q in tensors}
    return len(kinds) == 1 and (torch.float32, tensors[0].device, False, False) in kinds


def _formula(v: Tensor, scales: Tensor, p: float) -> Tensor:
    """Return one of the weights as part of a graph, for second derivatives."""
    flat = v.view(_channels(v), -1) if v.is_contiguous() else v.flatten(1)
    if p == math.inf:
        norms = flat.gather(1, flat.detach().abs().argmax(1, keepdim=True)).abs()
    else:
        norms = torch.linalg.vector_norm(flat, p, dim=1, keepdim=True)
    zero, columns = norms == 0, scales.expand(len(flat)).unsqueeze(1)
    return (flat / norms.masked_fill(zero, 1) * (columns * ~zero)).view(v.shape)


def row_norms(rows: Sequence[Tensor], p: float) -> Tensor:
    """Return ‖row‖_p of all (C, …) weights, one after the other; or nothing, as below."""
    if not _are_alike(rows):
        return torch.empty(0)
    flat, table, launch = _gather(rows, [p] * len(rows))
    norms = flat.new_empty(len(table))
    with on_device_of(flat):
        launch(normalise_rows, flat, table, norms, None, None)
    return norms


def normalise_weights(
    rows: Sequence[Tensor], scales: Sequence[Tensor], ps: Sequence[float]
) -> Sequence[Tensor]:
    """Return s · v / ‖v‖_p of all (C, …) rows; nothing where one is not for the kernels."""
    if not _are_alike((*rows, *scales)):
        return []
    return NormalisedWeights.apply(ps, *rows, *scales)  # type: ignore[no-any-return]


class NormalisedWeights(torch.autograd.Function):
    """`normalise_weights`, of which a graph serves several backward passes."""

    @staticmethod
    def forward(ctx: Any, ps: Sequence[float], *tensors: Tensor) -> tuple[Tensor, ...]:
        rows, scales = tensors[: len(ps)], tensors[len(ps) :]
        flat, table, launch = _gather(rows, ps)
        each = zip(scales, rows, strict=True)
        spread = torch.cat([s.detach().expand(_channels(v)) for s, v in each])
        norms, w = flat.new_empty(len(table)), torch.empty_like(flat)
        with on_device_of(flat):
            launch(normalise_rows, flat, table, norms, spread, w)
        ctx.set_materialize_grads(False)
        ctx.versions = [q._version for q in tensors]
        ctx.kept = ps, tensors, (flat, table, norms, spread), launch  # which no checkpoint counts
        return tuple(_scatter(w, rows))

    @staticmethod
    def backward(ctx: Any, *dws: Tensor | None) -> tuple[Tensor | None, ...]:
        ps, tensors, (flat, table, norms, spread), launch = ctx.kept
        rows, scales = tensors[: len(ps)], tensors[len(ps) :]
        needs = [
            n and q is not None for n, q in zip(ctx.needs_input_grad[1:], 2 * dws, strict=True)
        ]
        versions = zip(tensors, ctx.versions, 2 * dws, strict=True)
        if any(q._version != version for q, version, dw in versions if dw is not None):
            raise RuntimeError(
                "A normalised weight was changed in place since the forward pass, so the gradient "
                "of that pass can no longer be computed."
            )
        if torch.is_grad_enabled():
            each = zip(dws, rows, scales, ps, strict=True)
            ws, arriving = zip(
                *((_formula(*of), q) for q, *of in each if q is not None), strict=True
            )
            inputs = [q for q, need in zip(tensors, needs, strict=True) if need]
            found = iter(torch.autograd.grad(ws, inputs, arriving, create_graph=True))
            return None, *(next(found) if need else None for need in needs)
        given = [torch.zeros_like(v) if q is None else q for q, v in zip(dws, rows, strict=True)]
        grads = torch.cat([_in_memory(q, v).reshape(-1) for q, v in zip(given, rows, strict=True)])
        dv, ds = torch.empty_like(flat), torch.empty_like(norms)
        with on_device_of(flat):
            launch(write_row_gradients, grads, flat, table, norms, spread, dv, ds)
        parts = zip(ds.split([_channels(v) for v in rows]), scales, strict=True)
        by_scale = [(part.sum() if s.numel() == 1 else part).view(s.shape) for part, s in parts]
        found_all = zip([*_scatter(dv, rows), *by_scale], needs, strict=True)
        return None, *(gradient if need else None for gradient, need in found_all)
