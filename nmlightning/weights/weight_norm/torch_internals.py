"""Every touch of what torch does not document, each with its test."""

from typing import Any

import torch
from torch import Tensor, nn


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


def recurrent_weights(layer: nn.RNNBase) -> list[str]:
    """Return the names of a recurrent layer's matrices, those that `proj_size` adds too."""
    return [name for name in layer._flat_weights_names if name.startswith("weight_")]


def attention_weights(layer: nn.MultiheadAttention) -> list[str]:
    """Return the names of the matrices that project into heads: one, or three of other widths."""
    names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    return ["in_proj_weight"] if layer._qkv_same_embed_dim else names


def let_copy(module: nn.Module) -> None:
    """Let a recurrent layer be deep-copied though it holds weights that were computed.

    It keeps those of its last forward in a list, where torch refuses to copy what has a graph. The
    copy computes its own before they are used.
    """
    cls: Any = type(module)  # of its own, as it is parametrized
    if isinstance(module, nn.RNNBase) and cls.__deepcopy__ is not _copy_recurrent:
        cls._copy_parametrized = cls.__deepcopy__
        cls.__deepcopy__ = _copy_recurrent


def _copy_recurrent(self: Any, memo: dict[int, Any]) -> Any:
    for w in self._flat_weights:
        if w is not None and not w.is_leaf:
            memo[id(w)] = w.detach()
    return self._copy_parametrized(memo)
