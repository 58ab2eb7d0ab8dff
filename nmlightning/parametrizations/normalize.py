"""Normalises weights to given channel norms, by the fastest implementation for each layout.

w_i = s_i v_i / n_i,        dv_i = s_i/n_i (dw_i − ⟨dw_i, v_i⟩/n_i · ∂n_i/∂v_i)
                                ds_i = ⟨dw_i, v_i⟩/n_i

where n_i = ‖v_i‖_p, and ∂n/∂v is sign(v) for p = 1, v/n for p = 2, and for p = ∞ the sign of the
largest element (of the first, where several are), 0 elsewhere. A channel of norm 0 has 0s.
Sums and products are in the dtype of the norms: float32, float64 for float64.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nmlightning.kernels.dispatch import weight_kernels
from nmlightning.weights.channel_norms import ROWS, ChannelLayout, are_plain, row_norms

Form = tuple[float, ChannelLayout]
_FAKE, _PROXY = torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY
_active_mode = torch._C._get_dispatch_mode


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
    x = v.to(torch.promote_types(v.dtype, torch.float32))
    norms = _norms_by_first(layout.rows(x), p)
    is_zero = norms == 0
    factors, norms = scales * ~is_zero, norms.masked_fill(is_zero, 1.0)
    # The norm divides first: a scale over its square, of the gradients, may be infinite.
    return (x / layout.spread(norms, x) * layout.spread(factors, x)).to(v.dtype)


def normalise_weight(
    v: Tensor, scales: Tensor, p: float, layout: ChannelLayout = ROWS, *, is_kept: bool = False
) -> Tensor:
    """Return `normalise_channels` in less time, of a v that nothing records or transforms.

    An inference tensor has the formula; with `is_kept` its graph may serve several backward passes.
    """
    form = p, layout
    if v.is_inference():
        return normalise_channels(v, scales.flatten(), p, layout)
    kernels = _kernels_for((v, scales))
    if hasattr(kernels, "normalise_weight"):  # on a CPU, in less time than a list of one
        by_kernels = kernels.normalise_weight(layout.rows(v), scales, p)
        if by_kernels is not None:
            return layout.from_rows(by_kernels, v.shape)
    elif kernels is not None:
        for each in normalise_weights([v], [scales], [form]):
            return each
    if not is_kept and (w := _by_kernel(v, scales, form)) is not None:
        return w
    if is_kept and torch.is_grad_enabled():
        return NormalisedWeight.apply(v, scales, form)  # type: ignore[no-any-return]
    return normalise_channels(v, scales.flatten(), p, layout)


def normalise_weights(
    vs: Sequence[Tensor], scales: Sequence[Tensor], forms: Sequence[Form]
) -> list[Tensor]:
    """Return `normalise_channels` of weights from one node of autograd, by kernels.

    Several backward passes may use it; it saves nothing that a checkpoint counts. The list is empty
    where the kernels are not built, or a weight is not for them.
    """
    kernels = _kernels_for((*vs, *scales)) if vs else None
    if kernels is None:
        return []
    rows = [layout.rows(v) for v, (_, layout) in zip(vs, forms, strict=True)]
    ws = kernels.normalise_weights(rows, scales, [p for p, _ in forms])
    each = zip(ws, vs, forms, strict=False)
    return [layout.from_rows(w, v.shape) for w, v, (_, layout) in each]


def _kernels_for(tensors: Sequence[Tensor]) -> Any:
    """Return the kernels of the first tensor's device, or None unless they may take all tensors.

    That they do not where tensors are made that have no values, or operations are noted.
    """
    kernels = weight_kernels(tensors[0].device.type)
    if kernels is None or not are_plain(tensors) or _active_mode(_FAKE) or _active_mode(_PROXY):
        return None
    return kernels


def _by_kernel(v: Tensor, scales: Tensor, form: Form) -> Tensor | None:
    """Return w from torch's kernel, or None where that has none of a form, dtype and device.

    Or where a channel is zero, of which it makes NaN; on a CPU the check waits for nothing.
    """
    if form != (2, ROWS) or v.dim() < 2 or not (v.is_cpu and v.is_contiguous()):
        return None
    if v.dtype not in (torch.float32, torch.float64) or scales.dtype != v.dtype:
        return None
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
        return _gradients(dw[0], v_needs, scales_need, *self.inputs)


class NormalisedWeight(torch.autograd.Function):
    """`normalise_channels` whose graph serves several backward passes: `apply(v, s, form)`.

    For that it holds v itself; as torch does, it checks that v was not changed since.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, scales: Tensor, form: Form) -> Tensor:
        ctx.inputs, ctx.versions = (v, scales, form), (v._version, scales._version)
        return normalise_channels(v, scales.flatten(), *form)

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        v, scales, form = ctx.inputs
        v_needs, scales_need, _ = ctx.needs_input_grad
        if (v._version, scales._version) != ctx.versions:
            raise RuntimeError(
                "A normalised weight was changed in place since the forward pass, so the gradient "
                "of that pass can no longer be computed."
            )
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            return *_gradients(dw, v_needs, scales_need, v, scales, form, create_graph), None


def _gradients(
    dw: Tensor,
    v_needs: bool,
    scales_need: bool,
    v: Tensor,
    scales: Tensor,
    form: Form,
    create_graph: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Return dv and ds, with `create_graph` as part of a graph, for second derivatives."""
    inputs = [x for x, is_needed in ((v, v_needs), (scales, scales_need)) if is_needed]
    w = normalise_channels(v, scales.flatten(), *form)
    grads = iter(torch.autograd.grad(w, inputs, dw, create_graph=create_graph))
    return next(grads) if v_needs else None, next(grads) if scales_need else None


def is_recorded() -> bool:
    """Return whether operations are being recorded or transformed: compiled, exported, vmapped."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
    )


def _norms_by_first(rows: Tensor, p: float) -> Tensor:
    """Return ‖row‖_p, whose derivative for p = ∞ is that of the first of several largest."""
    if p != math.inf:
        return row_norms(rows, p)
    flat = rows.flatten(1)
    largest = flat.detach().abs().argmax(1, keepdim=True)
    return flat.gather(1, largest).abs().squeeze(1)
