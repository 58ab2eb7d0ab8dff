"""The activations that a network may have, and the initialisation that fits each."""

from typing import Literal

from torch import nn

from nmlightning.errors import check_choice
from nmlightning.models.translated_relu import TReLU

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
