"""Weights whose output channels have given norms: the formula, and its twin for training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nmlightning.weights.channel_norms import ROWS, ChannelLayout, row_norms
from nmlightning.weights.weight_norm.normalised_rows import normalise_rows, rows_backward

Form = tuple[float, ChannelLayout]


def normalise_channels(v: Tensor, scales: Tensor, p: float, layout: ChannelLayout = ROWS) -> Tensor:
    """Return w_i = s_i v_i / ‖v_i‖_p for every output channel i; 0 where v_i is 0.

    It is made of plain operations, which compile, export, transform (`torch.func`) and can be
    differentiated any number of times. `NormalisedWeights` gives the same in less time.

    Args:
        v: (C, …), or as `layout` says; a vector is one channel. Any floating-point dtype.
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
    if v.dim() == 1:
        return normalise_channels(v[None], scales, p, layout)[0]
    norms = row_norms(layout.rows(v), p)
    is_zero = norms == 0
    factors = scales / norms.masked_fill(is_zero, 1.0) * ~is_zero
    return (v * layout.spread(factors, v)).to(v.dtype)


def normalise_together(
    vs: Sequence[Tensor], scales: Sequence[Tensor], forms: Sequence[Form]
) -> list[Tensor]:
    """Return `normalise_channels` of each v, by one node of the autograd graph.

    No channel may be zero. The node waits for the gradients of all weights before it gives any
    back; of weights without one it gives none.

    Args:
        vs: as for `normalise_channels`.
        scales: of each.
        forms: p and the layout of each.
    """
    if torch.is_grad_enabled():
        return list(NormalisedWeights.apply(tuple(forms), *vs, *scales))
    return [_Normalised.of(*each).w for each in zip(vs, scales, forms, strict=True)]


@dataclass(slots=True)
class _Normalised:
    """A weight, and what its derivative needs; s in one element for each row."""

    w: Tensor
    scales: Tensor
    norms: Tensor | None

    @classmethod
    def of(cls, v: Tensor, scales: Tensor, form: Form) -> "_Normalised":
        p, layout = form
        rows = rows_in_memory(v, layout)
        if rows is None:
            return cls(normalise_channels(v, scales, p, layout), scales, None)
        by_row = scales if scales.numel() == len(rows) else scales.expand(len(rows)).contiguous()
        w, norms = normalise_rows(rows, by_row.view(-1), p)
        return cls(_as_in_memory(w, v), by_row.view(-1), norms)


class NormalisedWeights(torch.autograd.Function):
    """`normalise_together`: `apply(forms, v_1, …, v_n, s_1, …, s_n)` returns w_1, …, w_n.

    One graph may serve several backward passes, so that weights can be computed once for many
    batches. For that it holds v itself; as torch does, it checks that v was not changed since.
    """

    @staticmethod
    def forward(ctx: Any, forms: tuple[Form, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(forms)
        vs, scales = tensors[:count], tensors[count:]
        done = [_Normalised.of(*each) for each in zip(vs, scales, forms, strict=True)]
        ctx.forms, ctx.vs, ctx.scales, ctx.done = forms, vs, scales, done
        ctx.versions = [(v._version, s._version) for v, s in zip(vs, scales, strict=True)]
        ctx.set_materialize_grads(False)
        pairs = zip(done, vs, scales, strict=True)
        frozen = [each.w for each, v, s in pairs if not (v.requires_grad or s.requires_grad)]
        ctx.mark_non_differentiable(*frozen)
        weights = tuple(each.w for each in done)
        for each in done:
            del each.w  # it is the graph's, not the node's
        return weights

    @staticmethod
    def backward(ctx: Any, *dws: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(ctx.forms)
        needed = ctx.needs_input_grad[1:]
        dvs: list[Tensor | None] = [None] * count
        dss: list[Tensor | None] = [None] * count
        for i, dw in enumerate(dws):
            if dw is not None and (needed[i] or needed[count + i]):
                dvs[i], dss[i] = _gradients(ctx, i, dw, needed[i], needed[count + i])
        return None, *dvs, *dss


def _gradients(
    ctx: Any, i: int, dw: Tensor, v_needs: bool, scales_need: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return dv and ds of weight i."""
    v, scales, (p, layout), done = ctx.vs[i], ctx.scales[i], ctx.forms[i], ctx.done[i]
    if (v._version, scales._version) != ctx.versions[i]:
        raise RuntimeError(
            "A weight that is normalised was changed in place since the forward pass, so the "
            "gradient of that pass cannot be computed any more."
        )
    if done.norms is None or torch.is_grad_enabled():
        return _gradients_of_formula(v, scales, (p, layout), dw, v_needs, scales_need)
    rows = rows_in_memory(v, layout)
    assert rows is not None
    dv, dots = rows_backward(_rows_as(dw, v), rows, done.scales, done.norms, p)
    ds = dots.sum_to_size(scales.shape).to(scales.dtype) if scales_need else None
    return (_as_in_memory(dv, v) if v_needs else None), ds


def _gradients_of_formula(
    v: Tensor, scales: Tensor, form: Form, dw: Tensor, v_needs: bool, scales_need: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return dv and ds by autograd, as a graph where a second derivative is asked for."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        v, scales = (x if again else x.detach().requires_grad_() for x in (v, scales))
        w = normalise_channels(v, scales, *form)
        inputs = [x for x, is_needed in ((v, v_needs), (scales, scales_need)) if is_needed]
        grads = iter(torch.autograd.grad(w, inputs, dw, create_graph=again))
    return next(grads) if v_needs else None, next(grads) if scales_need else None


def rows_in_memory(v: Tensor, layout: ChannelLayout) -> Tensor | None:
    """Return v as a (C, D) view, if its channels lie one after the other; a vector as one row."""
    if layout.transposed_groups is not None:
        return None
    if v.is_contiguous():
        return v.detach().view(1, -1) if v.dim() == 1 else v.detach().view(len(v), -1)
    ordered = v.detach().permute(_memory_order(v))
    return ordered.flatten(1) if ordered.is_contiguous() else None


def _rows_as(x: Tensor, v: Tensor) -> Tensor:
    """Return x as rows in the order in memory of v."""
    if v.dim() == 1:
        return x.reshape(1, -1)
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
