"""Normalises weights to given channel norms, by the fastest implementation for each layout.

w_i = s_i v_i / n_i,        dv_i = s_i/n_i (dw_i − ⟨dw_i, v_i⟩/n_i · ∂n_i/∂v_i)
                                ds_i = ⟨dw_i, v_i⟩/n_i

where n_i = ‖v_i‖_p, and ∂n/∂v is sign(v) for p = 1, v/n for p = 2, and for p = ∞ the sign of the
largest element (of the first, where several are), 0 elsewhere. A channel of norm 0 has 0s.
Sums and products are in the dtype of the norms: float32, float64 for float64.
"""

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from nmlightning.weights.channel_norms import ROWS, ChannelLayout, row_norms

Form = tuple[float, ChannelLayout]
_ELEMENTS_IN_CACHE = 2**16


def normalise_channels(v: Tensor, scales: Tensor, p: float, layout: ChannelLayout = ROWS) -> Tensor:
    """Return w_i = s_i v_i / ‖v_i‖_p for every output channel i; 0 where v_i is 0.

    It is made of plain operations, which compile, export, transform (`torch.func`) and can be
    differentiated any number of times. `normalise_weight` gives the same in less time.

    Args:
        v: (C, …), or as `layout` says; a vector is one channel. Any floating-point dtype.
        scales: s, (C,) or one element.
        p: 1, 2 or `math.inf`.
        layout: where the output channels are.

    Returns:
        w, of the shape and dtype of v. Norms accumulate in float32, in float64 for float64, and the
        product with them is rounded to the dtype of v once.

    Examples:
        >>> normalise_channels(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor(10.0), 2)
        tensor([[ 6.,  8.],
                [ 0., 10.]])
    """
    if v.dim() == 1:
        return normalise_channels(v[None], scales, p, layout)[0]
    factors, norms = _spare_zeros(scales, _norms_by_first(layout.rows(v), p))
    return (v * layout.spread(factors / norms, v)).to(v.dtype)


def normalise_weight(
    v: Tensor, scales: Tensor, p: float, layout: ChannelLayout = ROWS, *, is_kept: bool = False
) -> Tensor:
    """Return `normalise_channels` in less time, of a v that nothing records or transforms.

    With `is_kept` its graph may serve several backward passes.
    """
    form = p, layout
    if not is_kept and _has_kernel(v, scales, form):
        w = _by_kernel(v, scales, form)
        if w is not None:
            return w
    if torch.is_grad_enabled():
        return NormalisedWeight.apply(v, scales, form)  # type: ignore[no-any-return]
    return select_implementation(v, form).normalise(v, scales, form)[0]


def _has_kernel(v: Tensor, scales: Tensor, form: Form) -> bool:
    """Return whether torch has a kernel of weight norm, whose check for zeros waits for nothing."""
    p, layout = form
    if p != 2 or v.dim() < 2 or not v.is_cpu or layout.transposed_groups is not None:
        return False
    in_float = v.dtype == torch.float32 or v.dtype == torch.float64
    return in_float and scales.dtype == v.dtype and v.is_contiguous()


def _by_kernel(v: Tensor, scales: Tensor, form: Form) -> Tensor | None:
    """Return w from torch's kernel, or None where a channel is zero, of which it makes NaN."""
    columns = scales.expand(v.shape[0]).contiguous().view(v.shape[0], *[1] * (v.dim() - 1))
    w, norms = torch._weight_norm_interface(v, columns, 0)
    if len(norms) and norms.detach().amin().item() == 0:
        return None
    if w.grad_fn is not None:
        w.grad_fn.register_hook(_WithGraph(v, columns, form))
    return w


class _WithGraph:
    """Replaces gradients of torch's kernel by ones with a graph, where the backward pass makes one.

    Torch's own take the norms for constants, so that second derivatives would be wrong (2.15.0).
    """

    __slots__ = ("inputs",)

    def __init__(self, v: Tensor, columns: Tensor, form: Form) -> None:
        self.inputs = v, columns, form

    def __call__(self, grads: tuple[Tensor | None, ...], dw: tuple[Tensor, ...]) -> Any:
        if not torch.is_grad_enabled():
            return None
        v_needs, scales_need = (grad is not None for grad in grads)
        return _differentiable_gradients(dw[0], v_needs, scales_need, *self.inputs)


class NormalisedWeight(torch.autograd.Function):
    """`normalise_weight`: `apply(v, s, form)` returns w.

    One graph may serve several backward passes. For that it holds v itself; as torch does, it
    checks that v was not changed since.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, scales: Tensor, form: Form) -> Tensor:
        ctx.implementation = select_implementation(v, form)
        w: Tensor
        w, ctx.saved = ctx.implementation.normalise(v, scales, form)
        ctx.inputs, ctx.versions = (v, scales, form), (v._version, scales._version)
        return w

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        v, scales, form = ctx.inputs
        v_needs, scales_need, _ = ctx.needs_input_grad
        if (v._version, scales._version) != ctx.versions:
            raise RuntimeError(
                "A normalised weight was changed in place since the forward pass, so the gradient "
                "of that pass can no longer be computed."
            )
        if torch.is_grad_enabled():
            return *_differentiable_gradients(dw, v_needs, scales_need, v, scales, form), None
        dv, ds = ctx.implementation.gradients(dw, v, scales, form, ctx.saved)
        if not scales_need:
            return dv, None, None
        ds = ds if scales.numel() == ds.numel() else ds.sum()
        return dv if v_needs else None, ds.view(scales.shape).to(scales.dtype), None


def _differentiable_gradients(
    dw: Tensor, v_needs: bool, scales_need: bool, v: Tensor, scales: Tensor, form: Form
) -> tuple[Tensor | None, Tensor | None]:
    """Return dv and ds as part of a graph, for second derivatives."""
    inputs = [x for x, is_needed in ((v, v_needs), (scales, scales_need)) if is_needed]
    w = normalise_channels(v, scales.flatten(), *form)
    grads = iter(torch.autograd.grad(w, inputs, dw, create_graph=True))
    return next(grads) if v_needs else None, next(grads) if scales_need else None


def is_recorded() -> bool:
    """Return whether operations are being recorded or transformed: compiled, exported, vmapped."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
    )


class Implementation(Protocol):
    """Computes w from v, and its derivative; s has one element, or one for each channel."""

    def normalise(self, v: Tensor, scales: Tensor, form: Form) -> tuple[Tensor, Any]:
        """Return w, and what `gradients` needs as `saved`."""

    def gradients(
        self, dw: Tensor, v: Tensor, scales: Tensor, form: Form, saved: Any
    ) -> tuple[Tensor, Tensor]:
        """Return dv, and ds of each channel, even where s is one element."""


def select_implementation(v: Tensor, form: Form) -> Implementation:
    """Return the fastest implementation for a weight; a vector is one channel."""
    if form[1].transposed_groups is not None:
        return BY_FORMULA
    if v.is_contiguous() or v.permute(_memory_order(v)).is_contiguous():
        return BY_ROWS
    return BY_FORMULA


class _ByRows:
    """Plain operations on channels that lie one after the other, a cache full at a time."""

    def normalise(self, v: Tensor, scales: Tensor, form: Form) -> tuple[Tensor, Any]:
        rows, p = _rows_in_memory(v), form[0]
        w, saved, scales = torch.empty_like(rows), [], scales.flatten().expand(rows.shape[0])
        for part in _parts(rows):
            factors, norms = _spare_zeros(scales[part], row_norms(rows[part], p))
            factors = factors / norms
            saved.append((factors, norms))
            torch.mul(rows[part], factors.unsqueeze(1), out=w[part])
        return _as_in_memory(w, v), saved

    def gradients(
        self, dw: Tensor, v: Tensor, scales: Tensor, form: Form, saved: Any
    ) -> tuple[Tensor, Tensor]:
        rows, row_grads = _rows_in_memory(v), _rows_in_memory(dw, like=v)
        dv, dots = torch.empty_like(rows), []
        for part, (factors, norms) in zip(_parts(rows), saved, strict=True):
            x, grad = (y[part].to(norms.dtype) for y in (rows, row_grads))
            dots.append((grad * x).sum(1).div_(norms))
            f = factors.unsqueeze(1)
            direct = torch.mul(grad, f, out=dv[part]) if dv.dtype == norms.dtype else grad * f
            _subtract_along_norm(direct, x, norms, f * dots[-1].unsqueeze(1), form[0])
            if dv.dtype != norms.dtype:
                dv[part] = direct
        return _as_in_memory(dv, v), dots[0] if len(dots) == 1 else torch.cat(dots)


class _ByFormula:
    """Autograd of plain operations: any other layout."""

    def normalise(self, v: Tensor, scales: Tensor, form: Form) -> tuple[Tensor, Any]:
        return normalise_channels(v, scales.flatten(), *form), None

    def gradients(
        self, dw: Tensor, v: Tensor, scales: Tensor, form: Form, saved: Any
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            v, scales = (x.detach().requires_grad_() for x in (v, scales))
            w = normalise_channels(v, scales.flatten(), *form)
            dv, ds = torch.autograd.grad(w, (v, scales), dw)
        return dv, ds


BY_ROWS, BY_FORMULA = _ByRows(), _ByFormula()


def _norms_by_first(rows: Tensor, p: float) -> Tensor:
    """Return ‖row‖_p, whose derivative for p = ∞ is that of the first of several largest."""
    if p != math.inf:
        return row_norms(rows, p)
    flat = rows.flatten(1)
    largest = flat.detach().abs().argmax(1, keepdim=True)
    return (
        flat.gather(1, largest).abs().squeeze(1).to(torch.promote_types(rows.dtype, torch.float32))
    )


def _spare_zeros(scales: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales that are 0 where the norm is, and norms that are 1 there."""
    is_zero = norms == 0
    return scales * ~is_zero, norms.masked_fill(is_zero, 1.0)


def _subtract_along_norm(x: Tensor, v: Tensor, norms: Tensor, factors: Tensor, p: float) -> None:
    """Subtract f_i ∂n_i/∂v_i from each row of x."""
    if p == 2:
        x.addcmul_(v, factors / norms.unsqueeze(1), value=-1)
    elif p == 1:
        x.addcmul_(v.sign(), factors, value=-1)
    else:
        largest = v.abs().argmax(1, keepdim=True)
        x.scatter_add_(1, largest, v.gather(1, largest).sign().mul_(-factors))


def _parts(rows: Tensor) -> Iterator[slice]:
    """Yield spans of rows, on a CPU so short that all passes but the first read the cache."""
    fit = _ELEMENTS_IN_CACHE // rows.shape[1] if rows.device.type == "cpu" else rows.shape[0]
    count = max(1, fit)
    for start in range(0, max(1, rows.shape[0]), count):
        yield slice(start, start + count)


def _rows_in_memory(x: Tensor, like: Tensor | None = None) -> Tensor:
    """Return x as (C, D) rows, in the order that it, or another tensor, has in memory."""
    v = x if like is None else like
    if x.dim() == 1:
        return x.view(1, -1)
    return (x if v.is_contiguous() else x.permute(_memory_order(v))).flatten(1)


def _as_in_memory(rows: Tensor, v: Tensor) -> Tensor:
    """Return (C, D) rows in the shape and memory format of v."""
    if v.is_contiguous():
        return rows.view(v.shape)
    order = _memory_order(v)
    inverse = sorted(range(v.dim()), key=order.__getitem__)
    return rows.view([v.shape[d] for d in order]).permute(inverse)


def _memory_order(v: Tensor) -> tuple[int, ...]:
    """Return dimension 0, then the others as they follow each other in memory."""
    return (0, *sorted(range(1, v.dim()), key=v.stride, reverse=True))
