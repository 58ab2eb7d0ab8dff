"""Rows of given norms, and their derivative, in as few passes over memory as torch's kernels allow.

    w_i = s_i v_i / n_i,        dv_i = s_i/n_i (dw_i − ⟨dw_i, v_i⟩/n_i · ∂n_i/∂v_i)

where n_i = ‖v_i‖_p of row i, and ∂n/∂v is sign(v) for p = 1, v/n for p = 2, and for p = ∞ the sign
of the largest element (of the first, where several are), 0 elsewhere. Rows are not zero. Sums and
products are in the dtype of the norms: float32, float64 for float64.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nmlightning.weights.channel_norms import row_norms

_ELEMENTS_IN_CACHE = 2**16


def normalise_rows(v: Tensor, scales: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return w, (C, D) as v is, and n, (C,); the scales are (C,)."""
    if _has_kernels(v, scales, p):
        w, norms = torch._weight_norm_interface(v, scales[:, None], 0)
        return w, norms[:, 0]
    w, norms = torch.empty_like(v), scales.new_empty(len(v), dtype=_accumulation_dtype(v))
    for part in _parts_in_cache(v):
        norms[part] = row_norms(v[part], p)
        torch.mul(v[part], (scales[part] / norms[part])[:, None], out=w[part])
    return w, norms


def rows_backward(
    dw: Tensor, v: Tensor, scales: Tensor, norms: Tensor, p: float
) -> tuple[Tensor, Tensor]:
    """Return dv, (C, D), and ds_i = ⟨dw_i, v_i⟩ / n_i, (C,)."""
    if _has_kernels(v, scales, p):
        dv, dots = torch.ops.aten._weight_norm_interface_backward(
            dw.contiguous(), v, scales[:, None], norms[:, None], 0
        )
        return dv, dots[:, 0]
    dv, dots = torch.empty_like(v), torch.empty_like(norms)
    for part in _parts_in_cache(v):
        n, factors = norms[part], scales[part] / norms[part]
        x, grad = v[part].to(n.dtype), dw[part].to(n.dtype)
        torch.div(torch.linalg.vecdot(grad, x), n, out=dots[part])
        along = (factors * dots[part]).neg_()[:, None]
        direct = torch.mul(grad, factors[:, None], out=dv[part] if v.dtype == n.dtype else None)
        _add_along_norm(direct, x, n, along, p)
        if v.dtype != n.dtype:
            dv[part] = direct
    return dv, dots


def _add_along_norm(to: Tensor, v: Tensor, norms: Tensor, factors: Tensor, p: float) -> None:
    """Add f_i ∂n_i/∂v_i to each row."""
    if p == 2:
        to.addcmul_(v, factors / norms[:, None])
    elif p == 1:
        to.addcmul_(v.sign(), factors)
    else:
        largest = v.abs().argmax(1, keepdim=True)
        to.scatter_add_(1, largest, factors * v.gather(1, largest).sign())


def _has_kernels(v: Tensor, scales: Tensor, p: float) -> bool:
    """Return whether torch has a kernel for each direction."""
    return p == 2 and v.dtype == scales.dtype and v.dtype in (torch.float32, torch.float64)


def _accumulation_dtype(v: Tensor) -> torch.dtype:
    return torch.promote_types(v.dtype, torch.float32)


def _parts_in_cache(v: Tensor) -> Iterator[slice]:
    """Yield spans of rows, on a CPU so short that all passes but the first read the cache."""
    count = max(1, _ELEMENTS_IN_CACHE // v.shape[1]) if v.device.type == "cpu" else len(v)
    for start in range(0, len(v), count):
        yield slice(start, start + count)
