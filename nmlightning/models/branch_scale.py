"""The scale at which the residual branches of a network start."""

import torch
from torch import nn


def scale_down(last_convolutions: list[nn.Conv2d]) -> None:
    """Divide the last convolution of each of n residual branches by √n, in place.

    The sum of all branches then has the variance of one.
    """
    with torch.no_grad():
        for convolution in last_convolutions:
            convolution.weight.div_(len(last_convolutions) ** 0.5)
