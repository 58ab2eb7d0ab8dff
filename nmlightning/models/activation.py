"""Activations, TReLU among them, and how the parameters of networks are drawn."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nmlightning.errors import check_choice

MEAN = 1 / math.sqrt(2 * math.pi)
STD = math.sqrt((1 - 1 / math.pi) / 2)


class TReLU(nn.Module):
    """Translated ReLU: it keeps mean 0 and variance 1 where no norm divides by a scale.

        y = (max(z, 0) − m) / s,    m = 1/√(2π) = 0.3989,    s = √(½ (1 − 1/π)) = 0.5838

    For a standard normal z with density φ, E max(z, 0) = ∫₀^∞ z φ(z) dz = φ(0) = 1/√(2π) = m, and
    E max(z, 0)² = ½ E z² = ½ by symmetry, so the variance is ½ − m² = ½ (1 − 1/π) = s². Any shape,
    in the input's dtype. The gradient is 1/s where z > 0, and 0 elsewhere, also at 0. There is no
    in-place form: the backward of the maximum needs its output, which the translation replaces.

    Source: Arpit et al. 2016 (arXiv 1603.01431); Hoffer et al. 2018 (arXiv 1803.01814) have it in
    networks with normalised weights.

    Examples:
        >>> import torch
        >>> TReLU()(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.6833, -0.6833,  1.0295])
    """

    def forward(self, input: Tensor) -> Tensor:
        # The difference is this function's own and nothing of it is kept, so it may be overwritten.
        return F.relu(input).sub(MEAN).mul_(1 / STD)


Activation = Literal["relu", "trelu"]


def make_activation(name: Activation) -> nn.Module:
    """Return a new activation; InputError for a name that there is not."""
    check_choice("activation", name, ("relu", "trelu"))
    return TReLU() if name == "trelu" else nn.ReLU(inplace=True)


def initialise(net: nn.Module, activation: Activation) -> None:
    """Draw the convolutions as He et al. (2015) derive it; norms and linear layers as torch.

    With σ² = 1 / (fan_out · E y²), y the activation of a standard normal: 2 / fan_out for ReLU,
    1 / fan_out for TReLU.
    """
    gain_of: Literal["linear", "relu"] = "linear" if activation == "trelu" else "relu"
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity=gain_of)
        elif isinstance(module, (nn.BatchNorm2d, nn.Linear)):
            module.reset_parameters()


def scale_down(last_layers: Sequence[nn.Conv2d | nn.Linear]) -> None:
    """Divide the last weight of n residual branches by √n: their sum has the variance of one."""
    with torch.no_grad():
        for layer in last_layers:
            layer.weight.div_(len(last_layers) ** 0.5)


def reset_parts(net: nn.Module) -> None:
    """Call `reset_parameters` of every part that has it, of an inner part before its outer one."""
    for module in reversed([*net.modules()][1:]):
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
