"""The scale at which the residual branches of a network start."""

from collections.abc import Sequence

import torch
from torch import nn


def scale_down(last_layers: Sequence[nn.Conv2d | nn.Linear]) -> None:
    """Divide the weight of the last layer of each of n residual branches by √n, in place.

    The sum of all branches then has the variance of one.
    """
    with torch.no_grad():
        for layer in last_layers:
            layer.weight.div_(len(last_layers) ** 0.5)
