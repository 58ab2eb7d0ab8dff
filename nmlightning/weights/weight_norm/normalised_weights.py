"""Many weights whose output channels have given norms, by one node of the autograd graph."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nmlightning.weights.weight_norm.ways import Form, choose_way, normalise_channels


def normalise_together(
    vs: Sequence[Tensor], scales: Sequence[Tensor], forms: Sequence[Form]
) -> Sequence[Tensor]:
    """Return `normalise_channels` of each v, by one node of the autograd graph.

    The node waits for the gradients of all weights before it gives any back, and gives none to a
    weight that has none.

    Args:
        vs: as for `normalise_channels`.
        scales: of each; `as_column` of them, once made, spares time.
        forms: p and the layout of each.
    """
    if torch.is_grad_enabled():
        return NormalisedWeights.apply(tuple(forms), *vs, *scales)  # type: ignore[no-any-return]
    each = zip(vs, scales, forms, strict=True)
    return [choose_way(v, s, form).normalise(v, s, form)[0] for v, s, form in each]


class NormalisedWeights(torch.autograd.Function):
    """`normalise_together`: `apply(forms, v_1, …, v_n, s_1, …, s_n)` returns w_1, …, w_n.

    One graph may serve several backward passes, so that weights can be computed once for many
    batches. For that it holds v itself; as torch does, it checks that v was not changed since.
    """

    @staticmethod
    def forward(ctx: Any, forms: tuple[Form, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        vs, scales = tensors[: len(forms)], tensors[len(forms) :]
        weights, ctx.done = [], []
        for v, s, form in zip(vs, scales, forms, strict=True):
            way = choose_way(v, s, form)
            w, saved = way.normalise(v, s, form)
            weights.append(w)
            ctx.done.append((v, s, form, way, saved, v._version, s._version))
        ctx.set_materialize_grads(False)
        sources = zip(weights, vs, scales, strict=True)
        frozen = [w for w, v, s in sources if not (v.requires_grad or s.requires_grad)]
        ctx.mark_non_differentiable(*frozen)
        return tuple(weights)

    @staticmethod
    def backward(ctx: Any, *dws: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        count = len(dws)
        grads: list[Tensor | None] = [None for _ in needed]
        for i, (dw, done) in enumerate(zip(dws, ctx.done, strict=True)):
            if dw is not None:
                grads[i], grads[count + i] = _gradients(dw, needed[i], needed[count + i], *done)
        return None, *grads


def _gradients(
    dw: Tensor,
    v_needs: bool,
    scales_need: bool,
    v: Tensor,
    scales: Tensor,
    form: Form,
    way: Any,
    saved: Any,
    *versions: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Return dv and ds, where they are needed."""
    if (v._version, scales._version) != versions:
        raise RuntimeError(
            "A weight that is normalised was changed in place since the forward pass, so the "
            "gradient of that pass cannot be computed any more."
        )
    if torch.is_grad_enabled():
        return _differentiable_gradients(dw, v_needs, scales_need, v, scales, form)
    dv, ds = way.gradients(dw, v, scales, form, saved)
    if not scales_need:
        return dv, None
    ds = ds if scales.numel() == ds.numel() else ds.sum()
    return dv if v_needs else None, ds.view(scales.shape).to(scales.dtype)


def _differentiable_gradients(
    dw: Tensor, v_needs: bool, scales_need: bool, v: Tensor, scales: Tensor, form: Form
) -> tuple[Tensor | None, Tensor | None]:
    """Return dv and ds as part of a graph, for second derivatives."""
    inputs = [x for x, is_needed in ((v, v_needs), (scales, scales_need)) if is_needed]
    w = normalise_channels(v, scales.flatten(), *form)
    grads = iter(torch.autograd.grad(w, inputs, dw, create_graph=True))
    return next(grads) if v_needs else None, next(grads) if scales_need else None
