"""Where kernels are launched."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of x the current one: Triton launches there, on its current stream."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
