"""The norms in operations that torch differentiates itself, as often and in whatever mode.

The functions with a backward of their own are faster, and that backward is not differentiable. So
these compute under `torch.func` and in forward mode, and a gradient of which another is asked for.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nmlightning.functional import statistics

LEAST_EPS = 1e-20  # beside squares of about 1; that to the power −3/2 is a float32


def plain_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistic: statistics.Statistic,
    constant: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `BatchNormFunction` does, on one rank."""
    dims, count = statistics.reduced_dims(x), x.numel() // x.shape[1]
    wide, unit, eps_in_it = _in_units(x.to(dtype), dims, eps)
    mean = wide.mean(dims, keepdim=True)
    square = constant**2 * _square(wide - mean, statistic, dims)
    y = _apply_affine(
        (wide - mean) / (square + eps_in_it).sqrt(), weight, bias, statistics.channel_shape(x)
    )
    mean, variance = (v.detach().flatten() for v in (mean * unit, square * unit * unit))
    return y.to(x.dtype), mean, variance * count / (count - 1)


def plain_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, rank: int, p: float, constant: float,
    eps: float, dtype: torch.dtype, centred: bool,
) -> Tensor:  # fmt: skip
    """Return what `LayerNormFunction` does."""
    dims = tuple(range(-rank, 0))
    wide, _, eps_in_it = _in_units(x.to(dtype), dims, eps)
    deviations = wide - wide.mean(dims, keepdim=True) if centred else wide
    square = constant**2 * _square(deviations, statistics.PowerMean(p), dims)
    y = _apply_affine(deviations / (square + eps_in_it).sqrt(), weight, bias, x.shape[-rank:])
    return y.to(x.dtype)


def plain_evaluation(
    x: Tensor,
    eps: float,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Return what torch's batch norm does in evaluation; a compiler cannot transform that."""
    shape = statistics.channel_shape(x)
    y = (x.to(mean.dtype) - mean.view(shape)) / (variance + eps).sqrt().view(shape)
    return _apply_affine(y, weight, bias, shape).to(x.dtype)


def _in_units(x: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return x over a unit, that unit, and eps over its square, of which a norm is the same.

    The unit is 1, or the largest |x| where squares and sums might be infinite. Of a constant x the
    eps must not be lost.
    """
    largest = x.detach().abs().amax(dims, keepdim=True)
    unit = torch.where(largest > statistics.HUGE, largest, 1.0)
    return x / unit, unit, (eps / unit / unit).clamp_min(min(eps, LEAST_EPS))


def _apply_affine(
    y: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]
) -> Tensor:
    y = y if weight is None else y * weight.to(y.dtype).view(shape)
    return y if bias is None else y + bias.to(y.dtype).view(shape)


def _square(deviations: Tensor, statistic: statistics.Statistic, dims: tuple[int, ...]) -> Tensor:
    """Return m² with dimensions of size 1 for `dims`; the slope of |d| at 0 is −1."""
    if isinstance(statistic, statistics.PowerMean) and statistic.p == 2.0:
        return deviations.square().mean(dims, keepdim=True)
    sizes = torch.where(deviations > 0, deviations, -deviations)
    if isinstance(statistic, statistics.PowerMean):
        if statistic.p == 1.0:
            return sizes.mean(dims, keepdim=True).square()
        largest = sizes.detach().amax(dims, keepdim=True)
        ratios = sizes / torch.where(largest > 0, largest, 1.0)
        mean = ratios.pow(statistic.p).mean(dims, keepdim=True)
        root = torch.where(mean > 0, mean, 1.0).pow(2 / statistic.p)
        return torch.where(mean > 0, largest.square() * root, 0.0)
    if isinstance(statistic, statistics.LargestMean):
        magnitude = sizes.transpose(0, 1).flatten(1).topk(statistic.k, 1).values.mean(1)
    else:
        rows = deviations.transpose(0, 1).flatten(1)
        parts = torch.split(rows, statistics.chunk_lengths(rows.shape[1], statistic.chunks), 1)
        ranges = [part.max(1).values - part.min(1).values for part in parts]
        magnitude = torch.stack(ranges).mean(0) / 2
    return magnitude.square().view(statistics.channel_shape(deviations))


def plain_gradients(
    function: Callable[..., Any], places: tuple[int, int, int], ctx: Any, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Return an autograd function's gradients by all arguments, connected to x, the weight, `grad`.

    Its first saved tensors are x and the weight; `ctx.bias` is the shape and the dtype of the bias,
    if there is one (no derivative depends on it). `function` computes the same of these three,
    which are in `places` of its arguments, and `ctx.plain`; `grad` is by its first result.
    """
    x, weight = ctx.saved_tensors[:2]
    bias = None if ctx.bias is None else x.new_zeros(ctx.bias[0], dtype=ctx.bias[1])
    create_graph = torch.is_grad_enabled()
    gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    with torch.enable_grad():
        # Aliases, since one of the inputs may depend on another.
        given = [
            q if q is None else q.view_as(q) if q.requires_grad else q.detach().requires_grad_()
            for q in (x, weight, bias)
        ]
        y = function(*given, *ctx.plain)
        y = y[0] if isinstance(y, tuple) else y
        wanted = [(i, q) for i, q in zip(places, given, strict=True) if q is not None]
        tensors = [q for _, q in wanted]
        found = torch.autograd.grad(y, tensors, grad, create_graph=create_graph)
    for (place, _), gradient in zip(wanted, found, strict=True):
        gradients[place] = gradient
    return tuple(gradients)
