"""Layer normalisation by a power mean: analytic forward and backward, differentiable once.

The same formula as in `batch_norm_function`, with one μ and ŝ for each token (the features of
`normalized_shape`) and a weight and bias for each feature:

    ∂L/∂x = (1/σ) · [h − mean h − c · (ŝ/σ) · mean(h x̂) · (s − mean s)],   h = weight · g

where s = count · ∂m/∂d is the slope of the power mean, of which the code has the reflection −s.
"""

from typing import Any

import torch
from torch import Tensor

from nmlightning.norms.accumulation import mean_of, share_mean, sum_of
from nmlightning.norms.cross_rank import Share
from nmlightning.norms.first_derivative import first_derivative_only
from nmlightning.norms.power_mean import power_mean, power_mean_slope
from nmlightning.norms.statistics import total_scale


class LayerNormFunction(torch.autograd.Function):
    """Normalise (*, *normalized_shape) over the last `rank` dimensions, in `dtype`; y is like x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rank: int,
        p: float,
        constant: float,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        dims = tuple(range(-rank, 0))
        wide = x.to(dtype)
        share = Share(x.shape[-rank:].numel())
        mean = share_mean(wide, dims, None)[0].view(*x.shape[:-rank], *[1] * rank)
        deviations = wide - mean
        magnitude = power_mean(deviations, p, dims, share).view_as(mean)
        y = deviations / total_scale(magnitude * constant, eps)
        ctx.save_for_backward(x, weight, mean, magnitude)
        ctx.dims, ctx.p, ctx.constant, ctx.eps = dims, p, constant, eps
        ctx.bias_dtype = None if bias is None else bias.dtype
        if weight is not None:
            y = y * weight.to(dtype)
        if bias is not None:
            y = y + bias.to(dtype)
        # Dynamo of torch 2.11 loses the gradients of a result that a cast returned as it was.
        return y if dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, magnitude = ctx.saved_tensors
        dims, lead = ctx.dims, tuple(range(x.dim() - len(ctx.dims)))
        share = Share(x.shape[-len(dims) :].numel())
        wide_grad = grad.to(mean.dtype)
        reflected = mean - x.to(mean.dtype)
        scale = magnitude * ctx.constant
        total = total_scale(scale, ctx.eps)
        normalised = -reflected / total
        inner = wide_grad if weight is None else wide_grad * weight.to(mean.dtype)
        slope = power_mean_slope(reflected, magnitude, ctx.p)
        pull = ctx.constant * (scale / total) * _mean(inner * normalised, dims, share)
        centred = slope - _mean(slope, dims, share)
        grad_x = (inner - _mean(inner, dims, share) + pull * centred) / total
        grad_weight = grad_bias = None
        if weight is not None:
            grad_weight = _sum_leading(wide_grad * normalised, lead).to(weight.dtype)
        if ctx.bias_dtype is not None:
            grad_bias = _sum_leading(wide_grad, lead).to(ctx.bias_dtype)
        return grad_x.to(x.dtype), grad_weight, grad_bias, *(None,) * 5


def _mean(values: Tensor, dims: tuple[int, ...], share: Share) -> Tensor:
    mean = mean_of(values, dims, share)
    return mean.view(*mean.shape, *[1] * len(dims))


def _sum_leading(values: Tensor, lead: tuple[int, ...]) -> Tensor:
    return sum_of(values, lead) if lead else values
