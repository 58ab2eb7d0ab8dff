"""Batch normalisation by any statistic: analytic forward and backward, differentiable once.

With d = x − μ, ŝ = c · m(d), σ = √(ŝ² + eps), x̂ = d / σ and y = weight · x̂ + bias, and with the
slope t = ∂m/∂d of the statistic, the gradient of a loss whose derivative by y is g is

    ∂L/∂x = (1/σ) · [h − mean h − c · (ŝ/σ) · Σ(h x̂) · (t − mean t)],   h = weight · g

(μ depends on x, hence the two means). Only x, the weight and per-channel values are kept for it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nmlightning.norms.accumulation import share_mean
from nmlightning.norms.cross_rank import sum_over_ranks
from nmlightning.norms.first_derivative import first_derivative_only
from nmlightning.norms.gaussian import Constant
from nmlightning.norms.gradient_sums import gradient_sums
from nmlightning.norms.selection import Selection
from nmlightning.norms.slope import Slope, channel_shape, reduced_dims
from nmlightning.norms.statistics import Statistic, total_scale


class BatchNormFunction(torch.autograd.Function):
    """Normalise each channel of (N, C, *spatial), over the ranks of `group` if there is one.

    Returns:
        y like x; mean (C,); unbiased variance ŝ² · n / (n − 1) (C,), both in `dtype`.
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
        wide = x.to(dtype)
        mean, share = share_mean(wide, reduced_dims(x), group)
        deviations = wide - mean.view(shape)
        magnitude, selection = statistic.measure(deviations, share)
        ctx.constant = statistic.constant(share.total, convention)
        scale = magnitude * ctx.constant
        total = total_scale(scale, eps)
        y = _apply_affine(deviations, total, weight, bias, shape)
        variance = scale.square() * share.total / (share.total - 1)
        ctx.mark_non_differentiable(mean, variance)
        shared_count = share.total if isinstance(share.total, Tensor) else None
        ctx.save_for_backward(x, weight, mean, magnitude, total, shared_count, *(selection or ()))
        ctx.statistic, ctx.group = statistic, group
        ctx.bias_dtype = None if bias is None else bias.dtype
        # Dynamo of torch 2.11 loses the gradients of a result that a cast returned as it was.
        return y if y.dtype == x.dtype else y.to(x.dtype), mean, variance

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, magnitude, total, shared_count, *selected = ctx.saved_tensors
        shape = channel_shape(x)
        count = x.numel() // x.shape[1] if shared_count is None else shared_count
        wide_grad = grad.to(mean.dtype)
        wide = x.to(mean.dtype)
        grad_bias, products = gradient_sums(wide_grad, wide, mean)
        grad_weight = products / total
        selection = Selection(*selected) if selected else None
        slope = Slope(wide, mean, magnitude, ctx.statistic, count, selection)
        sums = sum_over_ranks(torch.stack([grad_bias, grad_weight, slope.sum()]), ctx.group)
        gain = 1 / total if weight is None else weight.to(mean.dtype) / total
        pull = gain * sums[1] * (magnitude / total) * ctx.constant**2
        offset = (pull * sums[2] - gain * sums[0]) / count
        grad_x = torch.addcmul(offset.view(shape), wide_grad, gain.view(shape))
        return (
            slope.add_to(grad_x, -pull).to(x.dtype),
            None if weight is None else grad_weight.to(weight.dtype),
            None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype),
            *(None,) * 5,
        )


def _apply_affine(
    deviations: Tensor, total: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int]
) -> Tensor:
    if weight is None:
        y = deviations / total.view(shape)
        return y if bias is None else y + bias.to(total.dtype).view(shape)
    gain = (weight.to(total.dtype) / total).view(shape)
    if bias is None:
        return deviations * gain
    shift = bias.to(total.dtype).view(shape)
    if torch.compiler.is_compiling():  # dynamo of torch 2.11 loses the gradients of what out= gave
        return torch.addcmul(shift, deviations, gain)
    return torch.addcmul(shift, deviations, gain, out=deviations)
