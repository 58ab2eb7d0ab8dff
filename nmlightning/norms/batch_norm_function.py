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

from nmlightning.norms.cross_rank import sum_over_ranks
from nmlightning.norms.first_derivative import first_derivative_only
from nmlightning.norms.statistics import (
    Count,
    PowerMean,
    Selection,
    Statistic,
    add_at_selection,
    power_mean,
    power_mean_slope,
    select_largest,
)


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
        count: Count,
        constant: float,
        eps: float,
        dtype: torch.dtype,
        group: ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dims, shape = _reduced_dims(x), _channel_shape(x)
        wide = x.to(dtype)
        mean = wide.mean(dims) if group is None else sum_over_ranks(wide.sum(dims), group) / count
        deviations = wide - mean.view(shape)
        magnitude, selection = _measure(deviations, statistic, dims, count, group)
        scale = magnitude * constant
        y = _apply_affine(deviations, _total_scale(scale, eps), weight, bias, shape)
        variance = scale.square() * count / (count - 1)
        ctx.mark_non_differentiable(mean, variance)
        shared_count = count if isinstance(count, Tensor) else None
        ctx.save_for_backward(x, weight, mean, magnitude, shared_count, *selection)
        ctx.statistic, ctx.constant, ctx.eps, ctx.group = statistic, constant, eps, group
        ctx.bias_dtype = None if bias is None else bias.dtype
        # Dynamo of torch 2.11 loses the gradients of a result that a cast returned as it was.
        return y if y.dtype == x.dtype else y.to(x.dtype), mean, variance

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, magnitude, shared_count, *selected = ctx.saved_tensors
        dims, shape = _reduced_dims(x), _channel_shape(x)
        count = x.numel() // x.shape[1] if shared_count is None else shared_count
        wide_grad = grad.to(mean.dtype)
        reflected = mean.view(shape) - x.to(mean.dtype)
        scale = magnitude * ctx.constant
        total = _total_scale(scale, ctx.eps)
        grad_bias = wide_grad.sum(dims)
        grad_weight = -(wide_grad * reflected).sum(dims) / total
        slope = _Slope(reflected, magnitude, ctx.statistic, count, selected)
        sums = sum_over_ranks(torch.stack([grad_bias, grad_weight, slope.sum()]), ctx.group)
        gain = 1 / total if weight is None else weight.to(mean.dtype) / total
        pull = gain * ctx.constant * (scale / total) * sums[1]
        offset = (pull * sums[2] - gain * sums[0]) / count
        grad_x = torch.addcmul(offset.view(shape), wide_grad, gain.view(shape))
        return (
            slope.add_to(grad_x, -pull).to(x.dtype),
            None if weight is None else grad_weight.to(weight.dtype),
            None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype),
            *(None,) * 6,
        )


class _Slope:
    """t = ∂m/∂d of a statistic: dense for a power mean, k elements a channel for the largest."""

    def __init__(
        self,
        reflected: Tensor,
        magnitude: Tensor,
        statistic: Statistic,
        count: Count,
        selected: list[Tensor],
    ) -> None:
        self.selection = Selection(*selected) if selected else None
        self.count = count
        self.dims, self.shape = _reduced_dims(reflected), _channel_shape(reflected)
        if isinstance(statistic, PowerMean):
            self.reflected = power_mean_slope(reflected, magnitude.view(self.shape), statistic.p)

    def sum(self) -> Tensor:
        """Return Σt of this rank's elements, (C,)."""
        if self.selection is not None:
            return self.selection.signs.mean(1)
        return -self.reflected.sum(self.dims) / self.count

    def add_to(self, tensor: Tensor, factor: Tensor) -> Tensor:
        """Add factor · t to `tensor`, in place, with a factor for each channel."""
        if self.selection is None:
            return tensor.addcmul_(self.reflected, (-factor / self.count).view(self.shape))
        weights = self.selection.signs / self.selection.signs.shape[1]
        return add_at_selection(tensor, self.selection, factor.unsqueeze(1) * weights)


def _measure(
    deviations: Tensor,
    statistic: Statistic,
    dims: tuple[int, ...],
    count: Count,
    group: ProcessGroup | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the statistic of each channel, (C,), and what its slope needs besides x."""
    if isinstance(statistic, PowerMean):
        return power_mean(deviations, statistic.p, dims, count, group).flatten(), ()
    return select_largest(deviations, statistic.k, group)


def _total_scale(scale: Tensor, eps: float) -> Tensor:
    return (scale.square() + eps).sqrt()


def _apply_affine(
    deviations: Tensor, total: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int]
) -> Tensor:
    if weight is None:
        y = deviations / total.view(shape)
        return y if bias is None else y + bias.to(total.dtype).view(shape)
    gain = (weight.to(total.dtype) / total).view(shape)
    if bias is None:
        return deviations * gain
    return torch.addcmul(bias.to(total.dtype).view(shape), deviations, gain)


def _reduced_dims(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()))


def _channel_shape(x: Tensor) -> list[int]:
    return [1, -1] + [1] * (x.dim() - 2)
