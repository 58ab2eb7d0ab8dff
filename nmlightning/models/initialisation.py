"""Initialisation: the scale of residual branches, and a reset of all parameters."""

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


def reset_parts(net: nn.Module) -> None:
    """Call `reset_parameters` of every part that has it, of an inner part before its outer one.

    So what a part draws of those inside it comes last.
    """
    for module in reversed([*net.modules()][1:]):
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
