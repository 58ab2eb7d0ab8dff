"""The one autograd function of a layer in int8."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nmlightning.functional.batch_norm import differentiable
from nmlightning.int8 import backends, quantizer
from nmlightning.kernels.interface import layout_of


class Settings(NamedTuple):
    """What `Int8Function` computes, and how.

    Attributes:
        operation: the convolution or matrix product.
        bits: of the input and the weight.
        per_channel: one scale for each output channel of the weight.
        gradient_bits, rounding: of the output's gradient.
        bifurcate: take the weight's gradient from the output's gradient before it is quantised.
        weight_gradient: the dtype that the weight's gradient is computed in; float32 or bfloat16.
        dtype: of the output.
        group: ranks to share the gradient's range with, or None.
        rank: of this process, so that each rounds by other random numbers.
    """

    operation: backends.Operation
    bits: int
    per_channel: bool
    gradient_bits: int
    rounding: quantizer.Rounding
    bifurcate: bool
    weight_gradient: torch.dtype
    dtype: torch.dtype
    group: ProcessGroup | None
    rank: int


class Int8Function(torch.autograd.Function):
    """The product of a quantised input and a quantised weight.

        y = s_x · s_w · Σ (q_x − z_x)(q_w − z_w) + bias
        ∂x = the same with Q(∂y) in the place of x and the weight's adjoint,  ∂w = x̂ · ∂y

    ∂w and the bias's gradient are of ∂y as it is, or of Q(∂y) without `bifurcate`. Every quantiser
    counts as the identity, also where it clipped. Kept for backward are the input as uint8 and the
    weight as int8. With a scale s_o for each output channel, Q(∂y) is Q(s_o · ∂y)/s_o, since a sum
    of integers over these channels has one scale.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        zero_point: Tensor,
        settings: Settings,
    ) -> Tensor:
        """Return (N, O, *) of (N, C, *) x, by the scale and the zero point of its grid."""
        grid = quantizer.Grid(scale, zero_point, settings.bits)
        weight_grid = quantizer.symmetric_grid(weight, settings.bits, settings.per_channel)
        operation = settings.operation
        with _without_autocast(x.device.type):
            backend = backends.select_backend(operation, x, weight)
            q = quantizer.quantize(x, grid, channels_last=True if backend.kernels else None)
            whole = quantizer.quantize_signed(weight, weight_grid)
            y = backends.multiply(backend, operation, q, grid, whole, weight_grid.scale, bias)
        ctx.save_for_backward(q, whole, scale, zero_point, weight_grid.scale)
        ctx.settings, ctx.backend, ctx.is_last = settings, backend, _has_channels_last(x, weight)
        ctx.weight_is_last = layout_of(weight) == "NHWC"
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        y = quantizer.lay_out(y, settings.dtype, ctx.is_last)
        if backend.kernels and y._is_view():  # torch would refuse that a ReLU changes it in place
            whole_tensor: Any = y.new_empty(0)
            y = whole_tensor.set_(y)
        return y

    @staticmethod
    @differentiable(what="layer in int8")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients by x, the weight and the bias."""
        settings: Settings = ctx.settings
        saved = ctx.saved_tensors  # once: checkpointing gives what it computed anew only once
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = grad_bias = None
        with _without_autocast(grad.device.type):
            if wants_x or not settings.bifurcate:
                grad_x, rounded = _input_gradient(ctx, saved, grad)
                grad = grad if settings.bifurcate else rounded
            if wants_weight:
                grad_weight = _weight_gradient(ctx, saved, grad).to(ctx.dtypes[1])
            if wants_bias:
                dims = [dim for dim in range(grad.dim()) if dim != 1]
                grad_bias = grad.sum(dims, dtype=saved[2].dtype).to(ctx.dtypes[2])
        return grad_x if wants_x else None, grad_weight, grad_bias, None, None, None


def _input_gradient(ctx: Any, saved: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient by x, and the output's gradient as it was quantised for it."""
    q, weight, scale, _, weight_scale = saved
    settings: Settings = ctx.settings
    largest = weight_scale.amax()
    relative = (weight_scale / largest).view(-1, *[1] * (grad.dim() - 2))
    scaled = grad * relative if settings.per_channel else grad
    grid = quantizer.make_grid(*quantizer.extreme(scaled, settings.group), settings.gradient_bits)
    operation, backend, adjoint = settings.operation, ctx.backend, None
    size = operation.spread_size(q.shape[2:], weight.shape[2:])
    if backend.kernels is not None:
        backend, adjoint = backends.select_gradient_backend(operation, grad, weight, size)
    last = True if adjoint else None
    q_grad = quantizer.quantize(
        scaled, grid, settings.rounding, stream=settings.rank, channels_last=last
    )
    rounded = quantizer.dequantize(q_grad, grid) / relative if not settings.bifurcate else grad
    if adjoint is None:
        steps = quantizer.centre(q_grad, grid, scale.dtype)
        found = operation.input_gradient(steps, weight.to(scale.dtype), q)
        found = backends.scale_sums(found, grid, largest)
    else:
        spread = operation.spread(q_grad, size, grid.zero_point)
        found = backends.multiply(backend, adjoint[0], spread, grid, adjoint[1], largest, None)
    return quantizer.lay_out(found, ctx.dtypes[0], ctx.is_last), rounded


def _weight_gradient(ctx: Any, saved: Sequence[Tensor], grad: Tensor) -> Tensor:
    q, weight, scale, zero_point, _ = saved
    settings: Settings = ctx.settings
    dtype = settings.weight_gradient if scale.dtype == torch.float32 else scale.dtype
    x = quantizer.centre(q, quantizer.Grid(scale, zero_point, settings.bits), dtype)
    grad = quantizer.lay_out(grad, dtype, layout_of(q) == "NHWC")
    found = backends.weight_gradient(ctx.backend, settings.operation, grad, x, weight)
    return quantizer.lay_out(found, scale.dtype, ctx.weight_is_last, scale)


def _without_autocast(device: str) -> torch.autocast:
    known = torch.amp.is_autocast_available(device)  # it is not for meta tensors
    return torch.autocast(device if known else "cpu", enabled=False)


def _has_channels_last(x: Tensor, weight: Tensor) -> bool:
    return "NHWC" in (layout_of(x), layout_of(weight))
