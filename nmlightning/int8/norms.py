"""Norms with a quantised input and a quantised gradient of the output, whatever the norm."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from nmlightning.errors import InputError, check_choice, check_flag
from nmlightning.functional.batch_norm import differentiable
from nmlightning.int8.quantizer import (
    Grid,
    Rounding,
    check_bits,
    dequantize,
    extreme,
    make_grid,
    quantize,
)
from nmlightning.int8.ranges import (
    input_grid,
    ranks_to_share_with,
    register_range,
    remove_range,
    this_rank,
)
from nmlightning.norms.batch_norm_base import check_momentum

_NAME = "int8_quantizer"


def quantize_norm(
    norm: nn.Module, bits: int = 8, gradient_bits: int = 8, rounding: Rounding = "stochastic",
    momentum: float | None = 0.1, sync: bool = False,
) -> None:  # fmt: skip
    """Let a norm see its input, and its output's gradient, as 8 bits or fewer can say them.

        y = norm(Q(x)),   ∂x = norm'(Q(∂y))

    The grids are those of `Int8Layer`, whose arguments these are: Q(x) is of the batch's mean
    range, in evaluation of the running one, in buffers that the norm gets; Q(∂y) of the extremes,
    also for the norm's weight and bias. What the norm computes in between, and what it keeps for
    backward, stays as it is. Any module whose first argument is a floating (N, *) tensor, by two
    hooks; a second call sets it anew.

    Raises:
        InputError: a setting outside what is allowed.

    Examples:
        >>> norm = nmlightning.L1BatchNorm2d(8)
        >>> quantize_norm(norm, gradient_bits=4)
        >>> norm(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])
        >>> restore_norm(norm)

    Source: Banner et al. 2018 (arXiv 1805.11046), who quantise Range batch norm.
    """
    quantizer = NormQuantizer(bits, gradient_bits, rounding, momentum, sync)
    if is_quantized(norm):
        restore_norm(norm)
    register_range(norm)
    quantizer.handles = (
        norm.register_forward_pre_hook(quantizer.before),
        norm.register_forward_hook(quantizer.after),
    )
    setattr(norm, _NAME, quantizer)


def restore_norm(norm: nn.Module) -> None:
    """Take back what `quantize_norm` did."""
    if not is_quantized(norm):
        raise InputError(f"{type(norm).__name__} is not quantised: call quantize_norm first.")
    for handle in getattr(norm, _NAME).handles:
        handle.remove()
    remove_range(norm)
    delattr(norm, _NAME)


def is_quantized(norm: nn.Module) -> bool:
    """Return whether `quantize_norm` was called for the norm."""
    return hasattr(norm, _NAME)


class NormQuantizer:
    """The two hooks of a quantised norm, with their settings."""

    handles: tuple[Any, ...] = ()

    def __init__(
        self, bits: int, gradient_bits: int, rounding: Rounding, momentum: float | None, sync: bool
    ) -> None:
        check_choice("rounding", rounding, ("stochastic", "nearest"))
        self.bits = check_bits("bits", bits)
        self.gradient_bits = check_bits("gradient_bits", gradient_bits)
        self.rounding = rounding
        self.momentum = check_momentum(momentum)
        self.sync = check_flag("sync", sync)

    def before(self, norm: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments of forward with the first quantised."""
        x, *rest = arguments
        group = ranks_to_share_with(norm, self.sync)
        grid = input_grid(norm, x, self.bits, self.momentum, group)
        return _QuantizedInput.apply(x, *grid), *rest

    def after(self, norm: nn.Module, arguments: tuple[Any, ...], y: Tensor) -> Tensor:
        """Return the output, whose gradient will be quantised."""
        if not y.requires_grad:
            return y
        group = ranks_to_share_with(norm, self.sync)
        settings = (self.gradient_bits, self.rounding, group, this_rank())
        quantized: Tensor = _QuantizedGradient.apply(y, *settings)
        return quantized


class _QuantizedInput(torch.autograd.Function):
    """x̂ of x; the gradient passes, also where x was clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        grid = Grid(scale, zero_point, bits)
        return dequantize(quantize(x, grid), grid).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None


class _QuantizedGradient(torch.autograd.Function):
    """The identity, whose gradient is quantised."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, bits: int, rounding: Rounding, group: ProcessGroup | None, rank: int
    ) -> Tensor:
        ctx.settings = bits, rounding, group, rank
        return y.clone()  # of a view torch refuses to change it in place, as a ReLU may

    @staticmethod
    @differentiable()
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        bits, rounding, group, rank = ctx.settings
        grid = make_grid(*extreme(grad, group), bits)
        rounded = dequantize(quantize(grad, grid, rounding, stream=rank), grid)
        return rounded.to(grad.dtype), None, None, None, None
