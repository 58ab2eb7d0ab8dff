"""VGG against torchvision's, whose features have the same convolutions and norms."""

import pytest
import torch
from torch import nn
from torchvision import models

from nmlightning.errors import InputError
from nmlightning.models.activation import TReLU
from nmlightning.models.vgg import VGG


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_vgg_features_equal_torchvisions(depth: int) -> None:
    with torch.device("meta"):
        theirs = getattr(models, f"vgg{depth}_bn")(init_weights=False).features
        ours = VGG(depth).features
    assert [type(layer) for layer in ours] == [type(layer) for layer in theirs]
    shapes = [m.weight.shape for m in theirs if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    assert [m.weight.shape for m in ours if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))] == shapes


def test_vgg_has_one_linear_layer() -> None:
    net = VGG(11, num_classes=7, in_channels=1)
    assert sum(isinstance(module, nn.Linear) for module in net.modules()) == 1
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 7)


def test_vgg_refuses_another_depth() -> None:
    with pytest.raises(InputError, match="no VGG of depth 12: choose 11, 13, 16 or 19"):
        VGG(12)


def test_vgg_activation_leaves_the_keys() -> None:
    plain, translated = VGG(11, width=16), VGG(11, width=16, activation="trelu")
    activations = [type(m) for m in translated.features if isinstance(m, (nn.ReLU, TReLU))]
    assert activations == [TReLU] * 8
    assert list(plain.state_dict()) == list(translated.state_dict())
    with pytest.raises(InputError, match="activation is 'relu' or 'trelu', got None"):
        VGG(11, activation=None)  # type: ignore[arg-type]


def test_vgg_width() -> None:
    net = VGG(11, width=16)
    widths = [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [16, 32, 64, 64, 128, 128, 128, 128]
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(InputError, match="width must be a whole number of at least 1, got 0"):
        VGG(11, width=0)
