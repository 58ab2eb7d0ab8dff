"""Batch normalisation by any statistic: analytic forward and backward; `plain` differentiates it.

With d = x − μ, ŝ = c · m(d), σ = √(ŝ² + eps), x̂ = d / σ and y = weight · x̂ + bias, and with the
slope t = ∂m/∂d of the statistic, the gradient of a loss whose derivative by y is g is

    ∂L/∂x = (1/σ) · [h − mean h − c · (ŝ/σ) · Σ(h x̂) · (t − mean t)],   h = weight · g

(μ depends on x, hence the two means). Only x, the weight and per-channel values are kept for it.

The `Half…` functions have the same formulas in the form that half can hold: divided by σ, never
multiplied by 1/σ; √(ŝ² + eps) without squares; means instead of sums. Only what is sent to other
ranks, and a product with the number of elements, is in float32.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nmlightning.functional import statistics
from nmlightning.functional.constants import Constant
from nmlightning.functional.plain import plain_batch_norm, plain_gradients
from nmlightning.functional.reductions import (
    is_eager,
    is_transformed,
    mean_of,
    share_mean,
    sum_of,
    sum_over_ranks,
)
from nmlightning.functional.selection import Selection

Backward = Callable[..., tuple[Tensor | None, ...]]


def gradient_sums(grad: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σg and Σ g · (x − μ) of each channel, (C,).

    Eager on a CPU, of float32 or float64, by torch's own batch norm, whose backward reads both
    tensors once and writes nothing; four passes less than the formula, which traced code fuses.
    """
    if _is_fast_in_torch(grad, x):
        _, product, total = torch.ops.aten.native_batch_norm_backward(
            grad, x, None, None, None, mean, torch.ones_like(mean), True, 0.0, [False, True, True]
        )
        return total, product
    dims = statistics.reduced_dims(x)
    deviations = x - mean.view(statistics.channel_shape(x))
    return sum_of(grad, dims), sum_of(grad * deviations, dims)


def _is_fast_in_torch(grad: Tensor, x: Tensor) -> bool:
    """Return whether to use torch's kernel, which is slow for tensors of other strides."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not x.numel():
        return False
    if x.is_contiguous():
        return grad.is_contiguous()
    return grad.stride() == x.stride() and x.movedim(1, -1).is_contiguous()


def differentiable(
    plain: Callable[..., Any] | None = None,
    places: tuple[int, int, int] = (0, 1, 2),
    what: str = "norm",
) -> Callable[[Backward], Backward]:
    """Let the backward of an autograd function be differentiated, and mapped by `torch.func`.

    By the function `plain`, with x, the weight and the bias in `places` of the arguments, where its
    forward put the other arguments into `ctx.plain`. Elsewhere a second derivative is a
    RuntimeError that names `what` it is of. Torch's own `once_differentiable` leaves the gradients
    unconnected to what they depend on. So `torch.autograd.grad(loss + penalty(gradient), x)` would
    leave the penalty out, unnoticed.
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def backward_again(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            again = torch.is_grad_enabled()
            if not (again or is_transformed(grads[0])):
                return backward(ctx, *grads)
            if plain is not None and ctx.plain is not None and not torch.compiler.is_compiling():
                return plain_gradients(plain, places, ctx, grads[0])
            if not again:
                return backward(ctx, *grads)
            with torch.no_grad():
                results = backward(ctx, *grads)
            sources = [*ctx.saved_tensors, *grads]
            return tuple(
                r if r is None else DifferentiatedOnce.apply(r, what, *sources) for r in results
            )

        return backward_again

    return decorate


class DifferentiatedOnce(torch.autograd.Function):
    """The identity of its first argument; its backward is an error."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, what: str, *sources: Tensor | None) -> Tensor:
        ctx.what = what
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            f"This {ctx.what} can be differentiated once, and a second derivative was asked for: a "
            "fused norm has it under norm_backend('formula'), int8, ranks and the mean in pure "
            "half have none."
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
        statistic: statistics.Statistic,
        convention: Constant | float,
        eps: float,
        dtype: torch.dtype,
        group: ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = statistics.channel_shape(x)
        wide = x.to(dtype)
        mean, share = share_mean(wide, statistics.reduced_dims(x), group)
        deviations = wide - mean.view(shape)
        magnitude, selection = statistic.measure(deviations, share)
        ctx.constant = statistic.constant(share.total, convention)
        scale = magnitude * ctx.constant
        bounded = statistics.is_bounded(scale) if group is None else None
        if bounded is False:
            settings = (statistic, convention, eps, torch.float64, group)
            return BatchNormFunction.forward(ctx, x, weight, bias, *settings)
        total = statistics.total_scale(scale, eps, bounded)
        y = _apply_affine(deviations, total, weight, bias, shape)
        variance = scale.square() * share.total / (share.total - 1)
        ctx.mark_non_differentiable(mean, variance)
        shared_count = share.total if isinstance(share.total, Tensor) else None
        ctx.save_for_backward(x, weight, mean, magnitude, total, shared_count, *(selection or ()))
        ctx.plain = None if group is not None else (statistic, ctx.constant, eps, dtype)
        ctx.statistic, ctx.group = statistic, group
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        # Dynamo of torch 2.11 loses the gradients of a result that a cast returned as it was.
        return y if y.dtype == x.dtype else y.to(x.dtype), mean, variance

    @staticmethod
    @differentiable(plain_batch_norm)
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, magnitude, total, shared_count, *selected = ctx.saved_tensors
        shape = statistics.channel_shape(x)
        count = x.numel() // x.shape[1] if shared_count is None else shared_count
        wide_grad = grad.to(mean.dtype)
        wide = x.to(mean.dtype)
        grad_bias, products = gradient_sums(wide_grad, wide, mean)
        grad_weight = products / total
        selection = Selection(*selected) if selected else None
        slope = statistics.Slope(wide, mean, magnitude, ctx.statistic, count, selection)
        sums = sum_over_ranks(torch.stack([grad_bias, grad_weight, slope.sum()]), ctx.group)
        gain = 1 / total if weight is None else weight.to(mean.dtype) / total
        pull = gain * sums[1] * (magnitude / total) * ctx.constant**2
        offset = (pull * sums[2] - gain * sums[0]) / count
        each = slope.scaled(-pull)
        if torch.compiler.is_compiling():  # and would compute these anew for each element
            gain, offset, each = torch.stack([gain, offset, each]).unbind()
        grad_x = torch.addcmul(offset.view(shape), wide_grad, gain.view(shape))
        return (
            slope.add_to(grad_x, each).to(x.dtype),
            None if weight is None else grad_weight.to(weight.dtype),
            None if ctx.bias is None else grad_bias.to(ctx.bias[1]),
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
    if is_eager(deviations):
        return torch.addcmul(shift, deviations, gain, out=deviations)
    return torch.addcmul(shift, deviations, gain)  # traces lose the gradients of what out= gave


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
        statistic: statistics.Statistic,
        convention: Constant | float,
        eps: float,
        dtype: torch.dtype,
        group: ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = statistics.channel_shape(x)
        half = x.to(dtype)
        mean, share = share_mean(half, statistics.reduced_dims(x), group)
        deviations = half - mean.view(shape)
        magnitude, selection = statistic.measure(deviations, share)
        ctx.constant = statistic.constant(share.total, convention)
        scale = magnitude * ctx.constant
        y = deviations / statistics.total_scale(scale, eps).view(shape)
        y = y if weight is None else y * weight.to(dtype).view(shape)
        y = y if bias is None else y + bias.to(dtype).view(shape)
        variance = scale.float().square() * share.total / (share.total - 1)
        wide_mean = mean.float()
        ctx.mark_non_differentiable(wide_mean, variance)
        shared_count = share.total if isinstance(share.total, Tensor) else None
        ctx.save_for_backward(x, weight, mean, magnitude, shared_count, *(selection or ()))
        ctx.plain = None if group is not None else (statistic, ctx.constant, eps, torch.float32)
        ctx.statistic, ctx.eps, ctx.group = statistic, eps, group
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        return y.to(x.dtype), wide_mean, variance

    @staticmethod
    @differentiable(plain_batch_norm)
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, magnitude, shared_count, *selected = ctx.saved_tensors
        dims, shape = statistics.reduced_dims(x), statistics.channel_shape(x)
        count = x.numel() // x.shape[1] if shared_count is None else shared_count
        half_grad = grad.to(mean.dtype)
        reflected = mean.view(shape) - x.to(mean.dtype)
        scale = magnitude * ctx.constant
        total = statistics.total_scale(scale, ctx.eps)
        grad_bias = sum_of(half_grad, dims)
        grad_weight = -sum_of(half_grad * (reflected / total.view(shape)), dims)
        selection = Selection(*selected) if selected else None
        half = x.to(mean.dtype)
        slope = statistics.Slope(half, mean, magnitude, ctx.statistic, count, selection)
        sums = sum_over_ranks(torch.stack([grad_bias, grad_weight, slope.sum().float()]), ctx.group)
        pull = sums[1] * (ctx.constant * (scale / total))
        offset = ((pull * sums[2] - sums[0]) / count).to(mean.dtype)
        grad_x = slope.add_to(half_grad + offset.view(shape), slope.scaled(-pull))
        grad_x = grad_x if weight is None else grad_x * weight.to(mean.dtype).view(shape)
        return (
            (grad_x / total.view(shape)).to(x.dtype),
            None if weight is None else grad_weight.to(weight.dtype),
            None if ctx.bias is None else grad_bias.to(ctx.bias[1]),
            *(None,) * 5,
        )


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
        mean, ctx.share = share_mean(half, statistics.reduced_dims(x), group)
        y = half - mean.view(statistics.channel_shape(x))
        y = y if bias is None else y + bias.to(dtype).view(statistics.channel_shape(x))
        wide_mean = mean.float()
        ctx.mark_non_differentiable(wide_mean)
        ctx.dtype, ctx.bias_dtype = dtype, None if bias is None else bias.dtype
        return y.to(x.dtype), wide_mean

    @staticmethod
    @differentiable()
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        half, dims = grad.to(ctx.dtype), statistics.reduced_dims(grad)
        grad_x = half - mean_of(half, dims, ctx.share).view(statistics.channel_shape(grad))
        grad_bias = None if ctx.bias_dtype is None else sum_of(half, dims).to(ctx.bias_dtype)
        return grad_x.to(grad.dtype), grad_bias, None, None


@torch._disable_dynamo  # type: ignore[attr-defined, untyped-decorator, unused-ignore]
def apply_without_autocast(
    function: type[torch.autograd.Function], x: Tensor, *arguments: Any
) -> Any:
    """Return `function.apply(x, *arguments)` with every result rounded to the dtype written.

    Autocast would compute some of it in float32, and compiled code keeps what lies between its
    loads and stores in float32.
    """
    with torch.autocast(x.device.type, enabled=False):
        return function.apply(x, *arguments)
