"""Layer and RMS norm by L1, by the CPU's kernels."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CpuLayerNorm:
    """The interface `LayerNormKernels`, by `torch.ops.nmlightning`.

    Args:
        centred: whether the mean is subtracted: a layer norm and no RMS norm.
    """

    centred: bool

    def forward(
        self,
        x: Tensor,
        features: int,
        weight: Tensor | None,
        bias: Tensor | None,
        constant: float,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """Return y like x, and the values of the rows that backward needs."""
        return torch.ops.nmlightning.layer_norm_forward(  # type: ignore[no-any-return]
            x, features, weight, bias, constant, eps, self.centred
        )

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        features: int,
        weight: Tensor | None,
        rows: Tensor,
        learned: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients by x and, if any is learned, by weight and bias, (features,)."""
        return torch.ops.nmlightning.layer_norm_backward(  # type: ignore[no-any-return]
            grad, x, features, weight, rows, learned, self.centred
        )
