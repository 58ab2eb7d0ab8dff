"""Layer and RMS norm by a backend's kernels: differentiable once."""

from typing import Any, Protocol

import torch
from torch import Tensor

from nmlightning.norms.first_derivative import first_derivative_only


class LayerNormKernels(Protocol):
    """The kernels of a backend for the norm of rows of `features` contiguous elements."""

    def forward(
        self,
        x: Tensor,
        features: int,
        weight: Tensor | None,
        bias: Tensor | None,
        constant: float,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """Return y like x, and the values of the rows that backward needs.

        Args:
            x: contiguous, of a dtype that the backend serves.
            features: how many elements a row has, at least 1.
            weight: (features,) float32, or None for 1.
            bias: (features,) float32, or None for 0.
            constant: c of ŝ = c · mean |x − μ|.
            eps: added to ŝ².
        """

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        features: int,
        weight: Tensor | None,
        rows: Tensor,
        learned: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients by x, like it, and, if `learned`, by weight and bias, float32."""


class KernelLayerNormFunction(torch.autograd.Function):
    """Normalise (*, *normalized_shape) over the last `rank` dimensions; y is like x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rank: int,
        kernels: LayerNormKernels,
        constant: float,
        eps: float,
    ) -> Tensor:
        ctx.features = x.shape[x.dim() - rank :].numel()
        wide = None if weight is None else weight.float()
        wide_bias = None if bias is None else bias.float()
        y, rows = kernels.forward(x, ctx.features, wide, wide_bias, constant, eps)
        ctx.save_for_backward(x, wide, rows)
        ctx.kernels = kernels
        ctx.learned = [None if q is None else (q.shape, q.dtype) for q in (weight, bias)]
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rows = ctx.saved_tensors
        learned = ctx.learned != [None, None]
        grad_x, *by_learned = ctx.kernels.backward(grad, x, ctx.features, weight, rows, learned)
        gradients = [
            None if form is None else by.view(form[0]).to(form[1])
            for form, by in zip(ctx.learned, by_learned, strict=True)
        ]
        return grad_x, *gradients, *(None,) * 4
