"""A weight whose output channels have given norms: the formula, and its twin for training."""

from typing import Any

import torch
from torch import Tensor

from nmlightning.weights.channel_norms import ROWS, ChannelLayout, row_norms


def normalise_channels(v: Tensor, scales: Tensor, p: float, layout: ChannelLayout = ROWS) -> Tensor:
    """Return w_i = s_i v_i / ‖v_i‖_p for every output channel i; 0 where v_i is 0.

    It is made of plain operations, which compile, export and can be differentiated any number of
    times. `NormalisedWeight` gives the same in less time.

    Args:
        v: (C, …), or as `layout` says; any floating-point dtype.
        scales: s, (C,) or one element.
        p: 1, 2 or `math.inf`.
        layout: where the output channels are.

    Returns:
        w, of the shape and dtype of v. Norms accumulate in float32, in float64 for float64, and the
        product with them is rounded to the dtype of v once.

    Example:
        >>> normalise_channels(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor(10.0), 2)
        tensor([[ 6.,  8.],
                [ 0., 10.]])
    """
    norms = row_norms(layout.rows(v), p)
    is_zero = norms == 0
    return _multiply(v, scales / norms.masked_fill(is_zero, 1.0) * ~is_zero, layout)


class NormalisedWeight(torch.autograd.Function):
    """`normalise_channels` of a weight without channels that are zero, with its own derivative.

        dv_i = s_i/n_i (dw_i − ⟨dw_i, v_i⟩/n_i · ∂n_i/∂v_i),        ds_i = ⟨dw_i, v_i⟩/n_i

    where n_i = ‖v_i‖_p, and ∂n/∂v is sign(v) for p = 1, v/n for p = 2, and for p = ∞ the sign of
    the largest element (of the first, where several are), 0 elsewhere. For p = 2 torch has a kernel
    for each direction, which its own weight norm uses, too.

    One graph may serve several backward passes, so that a weight can be computed once for many
    batches. For that it holds v itself; as torch does, it checks that v was not changed since.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, scales: Tensor, p: float, layout: ChannelLayout) -> Tensor:
        ctx.v, ctx.scales, ctx.p, ctx.layout = v, scales, p, layout
        ctx.versions = v._version, scales._version
        if has_kernels(v, p, layout):
            ctx.column = as_column(scales, v)
            w, ctx.norms = torch._weight_norm_interface(v, ctx.column, 0)
            return w
        ctx.column = None
        ctx.norms = row_norms(layout.rows(v), p)
        return _multiply(v, scales / ctx.norms, layout)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dw,) = grads
        if (ctx.v._version, ctx.scales._version) != ctx.versions:
            raise RuntimeError(
                "A weight that is normalised was changed in place since the forward pass, so the "
                "gradient of that pass cannot be computed any more."
            )
        if torch.is_grad_enabled():
            return *_gradients_of_formula(ctx, dw), None, None
        if ctx.column is None:
            return *_gradients_by_rows(ctx, dw), None, None
        dv, dots = torch.ops.aten._weight_norm_interface_backward(
            dw.contiguous(), ctx.v, ctx.column, ctx.norms, 0
        )
        return dv, _gradient_of_scales(ctx, dots.view(-1)), None, None


def normalise_values(v: Tensor, scales: Tensor, p: float, layout: ChannelLayout) -> Tensor:
    """Return what `NormalisedWeight` does, to the bit, where no gradient is wanted."""
    if has_kernels(v, p, layout):
        return torch._weight_norm_interface(v, as_column(scales, v), 0)[0]
    return normalise_channels(v, scales, p, layout)


def has_kernels(v: Tensor, p: float, layout: ChannelLayout) -> bool:
    """Return whether torch's kernels normalise such a weight."""
    plain = layout.transposed_groups is None and v.is_contiguous()
    return plain and p == 2 and v.dtype in (torch.float32, torch.float64)


def as_column(scales: Tensor, v: Tensor) -> Tensor:
    """Return s as (C, 1, …), as the kernels take it."""
    columns = scales if scales.numel() == len(v) else scales.expand(len(v)).contiguous()
    return columns.view(-1, *[1] * (v.dim() - 1))


def _multiply(v: Tensor, factors: Tensor, layout: ChannelLayout) -> Tensor:
    return (v * layout.spread(factors, v)).to(v.dtype)


def _memory_order(v: Tensor) -> tuple[int, ...]:
    """Return dimension 0, then the others as they follow each other in memory."""
    return (0, *sorted(range(1, v.dim()), key=v.stride, reverse=True))


def _rows_in_memory(v: Tensor, layout: ChannelLayout) -> Tensor | None:
    """Return v as a (C, D) view, if its channels lie one after the other."""
    ordered = v.detach().permute(_memory_order(v))
    return ordered.flatten(1) if layout == ROWS and ordered.is_contiguous() else None


def _as_in_memory(rows: Tensor, v: Tensor) -> Tensor:
    """Return (C, D) rows in the shape and memory format of v."""
    order = _memory_order(v)
    inverse = sorted(range(v.dim()), key=order.__getitem__)
    return rows.view([v.shape[d] for d in order]).permute(inverse).to(v.dtype)


def _gradient_of_scales(ctx: Any, dots: Tensor) -> Tensor | None:
    """Return ds, given ⟨dw_i, v_i⟩ / n_i."""
    if not ctx.needs_input_grad[1]:
        return None
    return dots.sum_to_size(ctx.scales.shape).to(ctx.scales.dtype)


def _gradients_of_formula(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:
    """Return dv and ds by autograd, as a graph where a second derivative is asked for."""
    needed = ctx.needs_input_grad[:2]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        v, scales = (x if again else x.detach().requires_grad_() for x in (ctx.v, ctx.scales))
        w = normalise_channels(v, scales, ctx.p, ctx.layout)
        inputs = [x for x, is_needed in zip((v, scales), needed, strict=True) if is_needed]
        grads = iter(torch.autograd.grad(w, inputs, dw, create_graph=again))
    return tuple(next(grads) if is_needed else None for is_needed in needed)


def _gradients_by_rows(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:
    """Return dv and ds, in the memory format of v."""
    rows = _rows_in_memory(ctx.v, ctx.layout)
    if rows is None:
        return _gradients_of_formula(ctx, dw)
    row_grads = dw.permute(_memory_order(ctx.v)).flatten(1)
    dv, dots = _gradients(row_grads, rows, ctx.norms, ctx.scales / ctx.norms, ctx.p)
    return _as_in_memory(dv, ctx.v), _gradient_of_scales(ctx, dots)


def _gradients(
    dw: Tensor, v: Tensor, norms: Tensor, factors: Tensor, p: float
) -> tuple[Tensor, Tensor]:
    """Return dv and ⟨dw_i, v_i⟩ / n_i of (C, D) rows, given n and s/n, in their dtype."""
    dw, v = dw.to(norms.dtype), v.to(norms.dtype)
    dots = (dw * v).sum(1) / norms
    dv, along = dw * factors[:, None], -(factors * dots)[:, None]
    if p == 2:
        dv.addcmul_(v, along / norms[:, None])
    elif p == 1:
        dv.addcmul_(v.sign(), along)
    else:
        largest = v.abs().argmax(1, keepdim=True)
        dv.scatter_add_(1, largest, along * v.gather(1, largest).sign())
    return dv, dots
