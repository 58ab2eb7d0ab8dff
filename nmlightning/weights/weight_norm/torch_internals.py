"""Every touch of what torch does not document, each with its test."""

import torch
from torch import Tensor


def normalise_by_kernel(v: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return s_i v_i / ‖v_i‖₂ and ‖v_i‖₂, (C, 1, …), as torch's own weight norm does.

    NaN or infinite where a norm is 0, also where its square only underflows.

    Args:
        v: (C, …), contiguous, float32 or float64.
        columns: s, (C, 1, …), of the same dtype.
    """
    w, norms = torch._weight_norm_interface(v, columns, 0)
    return w, norms


def differentiate_by_kernel(
    dw: Tensor, v: Tensor, columns: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor]:
    """Return dv and ds, (C, 1, …), of `normalise_by_kernel`."""
    dv, ds = torch.ops.aten._weight_norm_interface_backward(dw, v, columns, norms, 0)
    return dv, ds


def is_recorded() -> bool:
    """Return whether operations are being recorded or transformed: compiled, exported, vmapped."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
    )


def is_captured(v: Tensor) -> bool:
    """Return whether a CUDA graph is being made, which has to hold the computation of w."""
    return v.is_cuda and torch.cuda.is_current_stream_capturing()
