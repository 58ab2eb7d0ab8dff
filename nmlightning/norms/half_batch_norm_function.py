"""Batch normalisation in half: every element, and every partial mean, is rounded to half.

The formulas of `batch_norm_function`, in the form that half can hold: divided by σ, never
multiplied by 1/σ; √(ŝ² + eps) without squares; means instead of sums. Only what is told to other
ranks, and a product with the number of elements, is in float32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nmlightning.norms.accumulation import share_mean, sum_of
from nmlightning.norms.cross_rank import sum_over_ranks
from nmlightning.norms.first_derivative import first_derivative_only
from nmlightning.norms.gaussian import Constant
from nmlightning.norms.selection import Selection
from nmlightning.norms.slope import Slope, channel_shape, reduced_dims
from nmlightning.norms.statistics import Statistic, total_scale


class HalfBatchNormFunction(torch.autograd.Function):
    """Normalise each channel of (N, C, *spatial) in `dtype`, which is half or bfloat16.

    Returns:
        y like x; mean (C,); unbiased variance ŝ² · n / (n − 1) (C,), both float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistic: Statistic,
        convention: Constant | float,
        eps: float,
        dtype: torch.dtype,
        group: ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = channel_shape(x)
        half = x.to(dtype)
        mean, share = share_mean(half, reduced_dims(x), group)
        deviations = half - mean.view(shape)
        magnitude, selection = statistic.measure(deviations, share)
        ctx.constant = statistic.constant(share.total, convention)
        scale = magnitude * ctx.constant
        y = deviations / total_scale(scale, eps).view(shape)
        y = y if weight is None else y * weight.to(dtype).view(shape)
        y = y if bias is None else y + bias.to(dtype).view(shape)
        variance = scale.float().square() * share.total / (share.total - 1)
        wide_mean = mean.float()
        ctx.mark_non_differentiable(wide_mean, variance)
        shared_count = share.total if isinstance(share.total, Tensor) else None
        ctx.save_for_backward(x, weight, mean, magnitude, shared_count, *(selection or ()))
        ctx.statistic, ctx.eps, ctx.group = statistic, eps, group
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y.to(x.dtype), wide_mean, variance

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, magnitude, shared_count, *selected = ctx.saved_tensors
        dims, shape = reduced_dims(x), channel_shape(x)
        count = x.numel() // x.shape[1] if shared_count is None else shared_count
        half_grad = grad.to(mean.dtype)
        reflected = mean.view(shape) - x.to(mean.dtype)
        scale = magnitude * ctx.constant
        total = total_scale(scale, ctx.eps)
        grad_bias = sum_of(half_grad, dims)
        grad_weight = -sum_of(half_grad * (reflected / total.view(shape)), dims)
        selection = Selection(*selected) if selected else None
        half = x.to(mean.dtype)
        slope = Slope(half, mean, magnitude, ctx.statistic, count, selection)
        sums = sum_over_ranks(torch.stack([grad_bias, grad_weight, slope.sum().float()]), ctx.group)
        pull = sums[1] * (ctx.constant * (scale / total))
        offset = ((pull * sums[2] - sums[0]) / count).to(mean.dtype)
        grad_x = slope.add_to(half_grad + offset.view(shape), -pull)
        grad_x = grad_x if weight is None else grad_x * weight.to(mean.dtype).view(shape)
        return (
            (grad_x / total.view(shape)).to(x.dtype),
            None if weight is None else grad_weight.to(weight.dtype),
            None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype),
            *(None,) * 5,
        )
