"""How the elements of (N, C, *spatial) lie in memory."""

from typing import Literal

import torch
from torch import Tensor

Layout = Literal["NCHW", "NHWC", "other"]
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def layout_of(x: Tensor) -> Layout:
    """Return "NCHW" for contiguous elements, "NHWC" for those with the channels last."""
    if x.is_contiguous():
        return "NCHW"
    memory_format = _CHANNELS_LAST.get(x.dim())
    if memory_format is not None and x.is_contiguous(memory_format=memory_format):
        return "NHWC"
    return "other"


def lay_out_like(tensor: Tensor, x: Tensor) -> Tensor:
    """Return `tensor`, copied unless its elements lie as those of x do, which has a layout."""
    if x.is_contiguous():
        return tensor.contiguous()
    return tensor.contiguous(memory_format=_CHANNELS_LAST[x.dim()])
