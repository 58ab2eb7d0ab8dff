"""Norms with a quantised input and a quantised gradient of the output, whatever the norm."""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from nmlightning.errors import InputError, check_choice, check_flag
from nmlightning.functional.batch_norm import DifferentiatedOnce
from nmlightning.int8 import ranges
from nmlightning.int8.quantizer import (
    Grid,
    Rounding,
    check_bits,
    dequantize,
    extreme,
    make_grid,
    quantize,
)
from nmlightning.norms.batch_norm_base import CONVERTS, check_momentum


def quantize_norm(
    norm: nn.Module, bits: int = 8, gradient_bits: int = 8, rounding: Rounding = "stochastic",
    momentum: float | None = 0.1, sync: bool = False, swapped_to: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Let a norm see its input, and its output's gradient, as 8 bits or fewer can say them.

        y = norm(Q(x)),   ∂x = norm'(Q(∂y))

    The grids are those of `Int8Layer`, whose arguments these are: Q(x) is of the batch's mean
    range, in evaluation of the running one, in buffers that the norm gets; Q(∂y) of the extremes,
    also for the norm's weight and bias. What the norm computes in between, and what it keeps for
    backward, stays as it is. Any module whose first argument is a floating (N, *) tensor, by two
    hooks; a second call sets it anew and keeps the range.

    Args:
        swapped_to: what `swap_int8` made of a norm of torch's, which `remove_int8` takes back.

    Raises:
        InputError: a setting outside what is allowed; no module, or a layer in int8.

    Examples:
        >>> norm = nmlightning.L1BatchNorm2d(8)
        >>> quantize_norm(norm, gradient_bits=4)
        >>> norm(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])
        >>> restore_norm(norm)

    Source: Banner et al. 2018 (arXiv 1805.11046), who quantise Range batch norm.
    """
    if not isinstance(norm, nn.Module) or ranges.holder_of(norm) is norm:
        raise InputError(f"norm is a torch.nn.Module that is not in int8 itself, got {norm!r}.")
    quantizer = NormQuantizer(bits, gradient_bits, rounding, momentum, sync)
    if swapped_to is not None:
        quantizer.swapped_to = swapped_to
    if (known := quantizer_of(norm)) is not None:
        vars(known).update(vars(quantizer))
        return
    ranges.register_range(norm)
    setattr(norm, ranges.QUANTIZER, quantizer)
    for name, method in _OVERRIDES.items():
        if hasattr(type(norm), name):
            setattr(norm, name, partial(method, norm))
    note_by: Any = norm.register_state_dict_post_hook
    quantizer.handles = (
        norm.register_forward_pre_hook(quantizer.before, with_kwargs=True),
        norm.register_forward_hook(quantizer.after),
        note_by(partial(NormQuantizer.note, quantizer)),
    )


def restore_norm(norm: nn.Module) -> None:
    """Take back what `quantize_norm` did."""
    if (quantizer := quantizer_of(norm)) is None:
        raise InputError(f"{type(norm).__name__} is not quantised: call quantize_norm first.")
    for handle in quantizer.handles:
        handle.remove()
    ranges.remove_range(norm)
    delattr(norm, ranges.QUANTIZER)
    for name in _OVERRIDES.keys() & vars(norm).keys():
        delattr(norm, name)


def quantizer_of(norm: nn.Module) -> "NormQuantizer | None":
    """Return the hooks of a norm that is quantised, None of any other module."""
    return vars(norm).get(ranges.QUANTIZER)


def _extra_repr(norm: nn.Module) -> str:
    options = {name: x for name, x in ranges.options_of(norm).items() if name != "swapped_to"}
    quantised = f"quantised({', '.join(f'{name}={x!r}' for name, x in options.items())})"
    return ", ".join(filter(None, [type(norm).extra_repr(norm), quantised]))


def _apply(norm: Any, fn: Any, recurse: bool = True) -> Any:
    with ranges.kept_wide(norm):
        return type(norm)._apply(norm, fn, recurse)


def _reset_parameters(norm: Any) -> None:
    type(norm).reset_parameters(norm)
    ranges.clear_range(norm)


def _named_children(norm: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    caller = sys._getframe(1).f_code.co_name
    if isinstance(norm, _BatchNorm) and CONVERTS.search(caller):
        raise InputError(
            f"{caller} would leave this quantised {type(norm).__name__} in floating point: call it "
            "before swap_int8, or call remove_int8 first."
        )
    return type(norm).named_children(norm)


_OVERRIDES: dict[str, Any] = {
    "extra_repr": _extra_repr,
    "_apply": _apply,
    "reset_parameters": _reset_parameters,
    "named_children": _named_children,
}


class NormQuantizer:
    """The two hooks of a quantised norm, with their settings."""

    handles: tuple[Any, ...] = ()
    swapped_to: dict[str, Any] | None = None  # as `describe_norm`, where it was torch's before

    def __init__(
        self, bits: int, gradient_bits: int, rounding: Rounding, momentum: float | None, sync: bool
    ) -> None:
        check_choice("rounding", rounding, ("stochastic", "nearest"))
        self.bits = check_bits("bits", bits)
        self.gradient_bits = check_bits("gradient_bits", gradient_bits)
        self.rounding = rounding
        self.momentum = check_momentum(momentum)
        self.sync = check_flag("sync", sync)

    def int8_options(self) -> dict[str, Any]:
        """Return the keywords of `quantize_norm`, and what it was swapped to."""
        names = ("bits", "gradient_bits", "rounding", "momentum", "sync", "swapped_to")
        return {name: getattr(self, name) for name in names}

    def note(self, norm: nn.Module, state: Any, prefix: str, metadata: dict[str, Any]) -> None:
        """Say in the metadata of a state dict what is quantised and how."""
        metadata[ranges.NOTE] = self.int8_options()

    def before(
        self, norm: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of forward with the first quantised."""
        if not arguments:  # norm(input=x)
            name, x = next(iter(keywords.items()), ("input", None))
            return (), {**keywords, name: self._quantized(norm, x)}
        x, *rest = arguments
        return (self._quantized(norm, x), *rest), keywords

    def _quantized(self, norm: nn.Module, x: Any) -> Tensor:
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            got = getattr(x, "dtype", x)
            raise InputError(f"A quantised {type(norm).__name__} takes floating inputs, got {got}.")
        group = ranges.ranks_to_share_with(norm, self.sync)
        grid = ranges.input_grid(norm, x, self.bits, self.momentum, group)
        return _QuantizedInput.apply(x, *grid)  # type: ignore[no-any-return]

    def after(self, norm: nn.Module, arguments: tuple[Any, ...], y: Tensor) -> Tensor:
        """Return the output, whose gradient will be quantised."""
        if y.requires_grad:
            # No autograd function, whose output an in-place ReLU could not change.
            group = ranges.ranks_to_share_with(norm, self.sync)
            quantize = partial(
                _quantize_gradient, bits=self.gradient_bits, rounding=self.rounding, group=group
            )
            y.register_hook(quantize)  # type: ignore[no-untyped-call]
        return y


def _quantize_gradient(
    grad: Tensor, bits: int, rounding: Rounding, group: ProcessGroup | None
) -> Tensor:
    with torch.no_grad():
        grid = make_grid(*extreme(grad, group), bits)
        rounded = dequantize(quantize(grad, grid, rounding, stream=ranges.this_rank()), grid)
        rounded = rounded.to(grad.dtype)
    if grad.requires_grad:
        rounded = DifferentiatedOnce.apply(rounded, "quantised norm", grad)
    return rounded


class _QuantizedInput(torch.autograd.Function):
    """x̂ of x; the gradient passes, also where x was clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        grid = Grid(scale, zero_point, bits)
        return dequantize(quantize(x, grid), grid).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None
