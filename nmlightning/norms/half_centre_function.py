"""Mean-only normalisation in half: what `mean_only` computes, with every result rounded to half."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nmlightning.norms.accumulation import mean_of, share_mean, sum_of
from nmlightning.norms.first_derivative import first_derivative_only
from nmlightning.norms.slope import channel_shape, reduced_dims


class HalfCentreFunction(torch.autograd.Function):
    """Subtract the mean of each channel of (N, C, *spatial) in `dtype`, half or bfloat16.

    Returns:
        y = x − μ + bias like x; μ (C,) float32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, dtype: torch.dtype, group: ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        half = x.to(dtype)
        mean, ctx.share = share_mean(half, reduced_dims(x), group)
        y = half - mean.view(channel_shape(x))
        y = y if bias is None else y + bias.to(dtype).view(channel_shape(x))
        wide_mean = mean.float()
        ctx.mark_non_differentiable(wide_mean)
        ctx.dtype, ctx.bias_dtype = dtype, None if bias is None else bias.dtype
        return y.to(x.dtype), wide_mean

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        half, dims = grad.to(ctx.dtype), reduced_dims(grad)
        grad_x = half - mean_of(half, dims, ctx.share).view(channel_shape(grad))
        grad_bias = None if ctx.bias_dtype is None else sum_of(half, dims).to(ctx.bias_dtype)
        return grad_x.to(grad.dtype), grad_bias, None, None
