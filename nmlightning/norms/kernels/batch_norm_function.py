"""Batch norm by a backend's kernels, within one process: differentiable once."""

from typing import Any

import torch
from torch import Tensor

from nmlightning.norms.first_derivative import first_derivative_only
from nmlightning.norms.kernels.job import BatchNormKernels, Job
from nmlightning.norms.kernels.layout import lay_out_like


class KernelBatchNormFunction(torch.autograd.Function):
    """Normalise each channel of (N, C, *spatial), and activate if the job says so.

    Returns:
        y like x; mean (C,); unbiased variance ŝ² · n / (n − 1) (C,), both float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        kernels: BatchNormKernels,
        job: Job,
    ) -> tuple[Tensor, Tensor, Tensor]:
        residual = None if residual is None else lay_out_like(residual, x)
        y, mean, variance, saved = kernels.forward(x, residual, _wide(weight), _wide(bias), job)
        ctx.mark_non_differentiable(mean, variance)
        ctx.save_for_backward(*saved)
        ctx.kernels, ctx.job = kernels, job
        ctx.dtypes = [None if q is None else q.dtype for q in (weight, bias)]
        return y, mean, variance

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.kernels.backward(grad, ctx.saved_tensors, ctx.job)
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            gradients.x,
            gradients.residual,
            None if weight_dtype is None else gradients.weight.to(weight_dtype),
            None if bias_dtype is None else gradients.bias.to(bias_dtype),
            None,
            None,
        )


def _wide(learned: Tensor | None) -> Tensor | None:
    return None if learned is None else learned.float()
