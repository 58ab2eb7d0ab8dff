"""CifarResNet against the published sizes and the paper's definition of its shortcut."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from nmlightning.errors import InputError
from nmlightning.models.activation import TReLU
from nmlightning.models.resnet import CifarResNet, ZeroPadShortcut


def count_by_hand(depth: int, num_classes: int = 10) -> int:
    """Count as in table 6 of the paper: 3×3 convolutions, a pair per norm channel, one linear."""
    n = (depth - 2) // 6
    convolutions = 3 * 16 + 2 * n * 16 * 16
    convolutions += 16 * 32 + (2 * n - 1) * 32 * 32
    convolutions += 32 * 64 + (2 * n - 1) * 64 * 64
    norms = 2 * (16 + 2 * n * (16 + 32 + 64))
    return 9 * convolutions + norms + (64 + 1) * num_classes


@pytest.mark.parametrize(
    ("depth", "published_millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)
def test_size_is_the_published_one(depth: int, published_millions: float) -> None:
    size = sum(parameter.numel() for parameter in CifarResNet(depth).parameters())
    assert size == count_by_hand(depth)
    assert size / 1e6 == pytest.approx(published_millions, rel=0.02)


@pytest.mark.parametrize("depth", [20, 56])
def test_depth_counts_the_weighted_layers(depth: int) -> None:
    modules = list(CifarResNet(depth).modules())
    assert sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in modules) == depth
    assert {type(m) for m in modules if "Norm" in type(m).__name__} == {nn.BatchNorm2d}


def test_classes_and_channels_are_free() -> None:
    net = CifarResNet(20, num_classes=7, in_channels=1)
    assert net(torch.randn(2, 1, 16, 16)).shape == (2, 7)


@pytest.mark.parametrize("depth", [21, 2, 0, -4, 20.0, "20", None])
def test_another_depth_is_refused(depth: Any) -> None:
    with pytest.raises(InputError, match=rf"depth {depth!r} is not 6n \+ 2: choose 20, 32, 44, 56"):
        CifarResNet(depth)


def test_shortcut_strides_and_pads_with_zeros() -> None:
    x = torch.randn(2, 4, 6, 6)
    y = ZeroPadShortcut(4, 8, stride=2)(x)
    assert y.shape == (2, 8, 3, 3)
    torch.testing.assert_close(y[:, 2:6], x[:, :, ::2, ::2], rtol=0, atol=0)
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


@pytest.mark.parametrize(("activation", "second_moment"), [("relu", 0.5), ("trelu", 1.0)])
def test_convolutions_start_as_he_et_al_draw_them(activation: Any, second_moment: float) -> None:
    weight = CifarResNet(20, activation=activation).layer3[1].conv1.weight
    # 36,864 samples: the estimate of a standard deviation has a relative error of 0.4 %.
    expected = (1 / (second_moment * 64 * 9)) ** 0.5
    assert weight.std().item() == pytest.approx(expected, rel=0.02)


def test_the_activation_is_an_option_that_leaves_the_keys_as_they_are() -> None:
    plain, translated = CifarResNet(20), CifarResNet(20, activation="trelu")
    types = [Counter(map(type, net.modules())) for net in (plain, translated)]
    assert types[0][nn.ReLU] == types[1][TReLU] == 19
    assert types[0][TReLU] == types[1][nn.ReLU] == 0
    assert list(plain.state_dict()) == list(translated.state_dict())
    with pytest.raises(InputError, match=r"activation is 'relu' or 'trelu', got 'trulu'\. Did you"):
        CifarResNet(20, activation="trulu")  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["relu", "trelu"])
def test_every_parameter_learns(activation: Any) -> None:
    net = CifarResNet(20, activation=activation)
    net(torch.randn(4, 3, 32, 32)).logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_scaled_branches_add_up_to_one() -> None:
    nets = []
    for scale_branches in (False, True):
        torch.manual_seed(0)
        nets.append(CifarResNet(20, scale_branches=scale_branches).state_dict())
    plain, scaled = nets
    for name, weight in plain.items():
        factor = 9**-0.5 if name.endswith("conv2.weight") else 1
        torch.testing.assert_close(scaled[name], weight * factor, msg=name)
