"""Autograd functions over a backend's kernels: batch norms.

A norm of one process in C++ is in none of them: its operator makes its own node, whose backward is
here where it is to be differentiated again.

On several ranks: the stages of the kernels with the collectives of `functional.reductions` between
them, as in the formula of `functional.batch_norm`, so that N ranks equal one process on their
batches concatenated. The ranks wait for each other twice in forward and once in backward.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nmlightning.functional.batch_norm import differentiable
from nmlightning.functional.constants import Constant
from nmlightning.functional.plain import plain_batch_norm, plain_gradients, plain_layer_norm
from nmlightning.functional.reductions import (
    Share,
    keep_largest_of_ranks,
    share_sums,
    sum_over_ranks,
)
from nmlightning.functional.selection import Selection, add_at_selection, mean_of_row
from nmlightning.functional.statistics import (
    LargestMean,
    PowerMean,
    RangeMean,
    Statistic,
    total_scale,
)
from nmlightning.kernels import interface


class KernelBatchNormFunction(torch.autograd.Function):
    """Normalise each channel of (N, C, *spatial), and activate if the spec says so.

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
        kernels: Any,
        spec: interface.NormSpec,
        *running: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        residual = None if residual is None else interface.lay_out_like(residual, x)
        learned = _wide(weight), _wide(bias)
        y, mean, variance, saved = kernels.forward(x, residual, *learned, spec, *running)
        ctx.mark_non_differentiable(mean, variance)
        ctx.kernels, ctx.spec = kernels, spec
        ctx.save_for_backward(*(x, weight) if spec.fused is None else (None, None), *saved)
        settings = (spec.statistic, spec.constant, spec.eps, torch.float32)
        ctx.plain = settings if spec.fused is None else None
        ctx.weight_dtype = None if weight is None else weight.dtype
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        return y, mean, variance

    @staticmethod
    @differentiable(plain_batch_norm, (0, 2, 3))
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.kernels.backward(grad, ctx.saved_tensors[2:], ctx.spec)
        return (
            gradients.x,
            gradients.residual,
            None if ctx.weight_dtype is None else gradients.weight.to(ctx.weight_dtype),
            None if ctx.bias is None else gradients.bias.to(ctx.bias[1]),
            *(None,) * (len(ctx.needs_input_grad) - 4),
        )


def normalise_by(
    kernels: Any,
    statistic: Statistic,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *state_and_settings: Any,
) -> list[Tensor]:
    """Return what `interface.Normalise` says, by kernels that are called from Python."""
    *state, constant, eps, momentum, fused = state_and_settings
    if residual is not None and not is_like(residual, x):
        return []
    spec = interface.NormSpec(statistic, constant, eps, fused)
    running = (*state, momentum)
    moved = (running,) if kernels.can_move(running, x) else ()
    found = KernelBatchNormFunction.apply(x, residual, weight, bias, kernels, spec, *moved)
    return list(found[:1] if moved else found)


def is_like(tensor: Tensor, other: Tensor) -> bool:
    """Return whether a kernel may read both by the same indices."""
    ours, theirs = ((q.shape, q.dtype, q.device, type(q)) for q in (tensor, other))
    return ours == theirs


def _wide(learned: Tensor | None) -> Tensor | None:
    return None if learned is None else learned.float().resolve_neg()


class RankBatchNormFunction(torch.autograd.Function):
    """Normalise each channel of this rank's (N, C, *spatial) over all ranks, and activate it.

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
        kernels: interface.BatchNormKernels,
        statistic: Statistic,
        convention: Constant | float,
        eps: float,
        fused: interface.Fused | None,
        group: ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor]:
        residual = None if residual is None else interface.lay_out_like(residual, x)
        sums, share = share_sums(kernels.sums(x), x.numel() // x.shape[1], group)
        mean = sums / share.total
        magnitude, selection = _measure(kernels, x, mean, statistic, share)
        constant = statistic.constant(share.total, convention)
        scale = magnitude * constant
        total = total_scale(scale, eps)
        gain = 1 / total if weight is None else weight.float() / total
        added = torch.zeros_like(mean) if bias is None else bias.float().resolve_neg()
        y = kernels.affine(x, residual, mean, gain, added, fused)
        variance = scale.square() * share.total / (share.total - 1)
        ctx.mark_non_differentiable(mean, variance)
        masked = y if fused else None
        channels = (mean, total, gain, constant * scale / total, share.total)
        ctx.save_for_backward(x, masked, *channels, *(selection or ()))
        ctx.kernels, ctx.statistic, ctx.group, ctx.added = kernels, statistic, group, fused
        ctx.dtypes = [None if q is None else q.dtype for q in (weight, bias)]
        return y, mean, variance

    @staticmethod
    @differentiable()
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, y, mean, total, gain, strength, count, *selected = ctx.saved_tensors
        selection = Selection(*selected) if selected else None
        grad = interface.lay_out_like(grad, x)
        own = ctx.kernels.gradient_sums(grad, x, y, mean, ctx.statistic)
        grad_bias, grad_weight = own[0], own[1] / total
        slopes = own[2] / count if selection is None else selection.slopes.sum(1)
        sums = sum_over_ranks(torch.stack([grad_bias, grad_weight, slopes]), ctx.group)
        pull = gain * strength * sums[1]
        offset = (pull * sums[2] - gain * sums[0]) / count
        each = pull / count if selection is None else None
        grad_x, masked = ctx.kernels.gradient(grad, x, y, mean, gain, offset, each)
        if selection is not None:
            grad_x = add_at_selection(grad_x, selection, -pull.unsqueeze(1) * selection.slopes)
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            grad_x,
            masked if ctx.added == "add_relu" else None,
            None if weight_dtype is None else grad_weight.to(weight_dtype),
            None if bias_dtype is None else grad_bias.to(bias_dtype),
            *(None,) * 6,
        )


def _measure(
    kernels: interface.BatchNormKernels, x: Tensor, mean: Tensor, statistic: Statistic, share: Share
) -> tuple[Tensor, Selection | None]:
    """Return m of all ranks' elements, and this rank's share of those it was selected by."""
    if not isinstance(statistic, LargestMean):
        sizes = sum_over_ranks(kernels.sums_of_sizes(x, mean), share.group)
        return sizes / share.total, None
    positions, signed = kernels.largest(x, mean, statistic.k)
    values, mine = keep_largest_of_ranks(signed.abs(), share.group)
    slopes = torch.where(signed > 0, 1.0, -1.0) / statistic.k
    assert mine is not None, "there is a group"
    return mean_of_row(values), Selection(positions, slopes * mine)


def _plain_layer_norm_gradients(
    grad: Tensor, x: Tensor, weight: interface.OptTensor, bias: torch.dtype | None, *settings: Any
) -> list[Tensor]:
    """Return the gradients of the operator `layer_norm` where they are to be differentiated."""
    rank, constant, eps, centred = settings
    context = SimpleNamespace(
        saved_tensors=(x, weight),
        bias=None if bias is None else (x.shape[-rank:], bias),
        plain=(rank, 1.0, constant, eps, torch.float32, centred),
        needs_input_grad=(True,) * 3,
    )
    found = plain_gradients(plain_layer_norm, (0, 1, 2), context, grad)
    return [gradient for gradient in found if gradient is not None]


def _batch_norm_backward(grad: Tensor, *saved: Any) -> tuple[Tensor, ...]:
    """Return the gradients by x, residual, weight and bias, to be differentiated."""
    constant, eps, fused, _, bias = saved[-1][-5:].tolist()
    deviations = saved[5]  # (C, k), or of Range (C, 2, chunks)
    statistic: Statistic = PowerMean(1.0)
    if deviations is not None:
        selects = LargestMean if deviations.dim() == 2 else RangeMean
        statistic = selects(deviations.shape[-1])
    ctx = SimpleNamespace(saved_tensors=saved, needs_input_grad=(True,) * 4)
    ctx.plain = None if fused else (statistic, constant, eps, torch.float32)
    ctx.bias = None if bias < 0 else (grad.shape[1:2], torch.float32)
    return tuple(grad.new_empty(0) if q is None else q for q in _backward(ctx, grad))


@differentiable(plain_batch_norm, (0, 2, 3))
def _backward(ctx: Any, grad: Tensor) -> tuple[interface.OptTensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.nmlightning.batch_norm_backward(grad, *ctx.saved_tensors)  # type: ignore[no-any-return]


_LIBRARY: Any = torch.library.Library("nmlightning", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "plain_layer_norm_gradients(Tensor grad, Tensor x, Tensor? weight, ScalarType? bias, int rank, "
    "float constant, float eps, bool centred) -> Tensor[]"
)
_LIBRARY.impl(
    "plain_layer_norm_gradients", _plain_layer_norm_gradients, "CompositeImplicitAutograd"
)
_LIBRARY.impl("batch_norm_backward", _batch_norm_backward, "AutogradCPU")
