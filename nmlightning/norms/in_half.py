"""Apply an autograd function so that every one of its operations rounds to half."""

from typing import Any

import torch
from torch import Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def apply_in_half(function: type[torch.autograd.Function], x: Tensor, *arguments: Any) -> Any:
    """Return `function.apply(x, *arguments)`, computed as it is written.

    Autocast would compute some of it in float32, and compiled code keeps what lies between its
    loads and stores in float32.
    """
    with torch.autocast(x.device.type, enabled=False):
        return function.apply(x, *arguments)
