"""A backward that refuses to be differentiated, on every road to a second derivative."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def first_derivative_only(backward: Backward) -> Backward:
    """Make a second derivative through `backward` of an autograd function a RuntimeError.

    Torch's own `once_differentiable` leaves the gradients unconnected to what they depend on. So
    `torch.autograd.grad(loss + penalty(gradient), x)` would leave the penalty out, unnoticed.
    """

    @functools.wraps(backward)
    def refuse_further(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        sources = [*ctx.saved_tensors, *grads]
        return tuple(r if r is None else _Refusal.apply(r, *sources) for r in results)

    return refuse_further


class _Refusal(torch.autograd.Function):
    """The identity of its first argument, whose backward is an error."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *sources: Tensor | None) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            "nmlightning's norms can be differentiated once, and a second derivative was asked for."
        )
