"""The addition and the ReLU that a norm may do besides, where no kernel does them with it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nmlightning.errors import InputError
from nmlightning.norms.kernels.job import Fused


def activate(y: Tensor, residual: Tensor | None, fused: Fused | None) -> Tensor:
    """Return y, ReLU(y) or ReLU(y + residual), as `fused` says; y may be used up."""
    if fused is None:
        return y
    in_place = not torch.compiler.is_compiling()  # y is nobody else's; a compiler sees to it itself
    return F.relu(y if residual is None else y + residual, inplace=in_place)


def check_residual(residual: Tensor | None, fused: Fused | None) -> None:
    """Raise InputError unless there is a residual exactly where one is to be added."""
    if residual is None and fused == "add_relu":
        raise InputError(
            "A norm with fused='add_relu' adds a residual, its second argument, and got none: call "
            "it by the module that it was fused in, or swap again without fuse."
        )
    if residual is not None and fused != "add_relu":
        raise InputError(f"A norm with fused={fused!r} adds no residual, and got one.")
