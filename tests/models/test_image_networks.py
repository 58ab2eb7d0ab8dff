"""CifarResNet against the published sizes; ResNet18, ResNet50 and VGG against torchvision's."""

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from nmlightning.errors import InputError
from nmlightning.models.activation import TReLU
from nmlightning.models.resnet import CifarResNet, ResNet18, ResNet50, ZeroPadShortcut
from nmlightning.models.vgg import VGG


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
def test_cifar_resnet_has_the_published_size(depth: int, published_millions: float) -> None:
    net = CifarResNet(depth)
    size = sum(parameter.numel() for parameter in net.parameters())
    assert size == count_by_hand(depth)
    assert size / 1e6 == pytest.approx(published_millions, rel=0.02)
    modules = list(net.modules())
    assert sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in modules) == depth
    assert {type(m) for m in modules if "Norm" in type(m).__name__} == {nn.BatchNorm2d}


@pytest.mark.parametrize("make", [partial(CifarResNet, 20), partial(VGG, 11)])
def test_network_takes_classes_and_channels(make: Any) -> None:
    net = make(num_classes=7, in_channels=1)
    assert sum(isinstance(module, nn.Linear) for module in net.modules()) == 1
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("depth", [21, 2, 0, -4, 20.0, "20", None])
def test_cifar_resnet_refuses_another_depth(depth: Any) -> None:
    with pytest.raises(InputError, match=rf"depth {depth!r} is not 6n \+ 2: choose 20, 32, 44, 56"):
        CifarResNet(depth)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_shortcut_strides_and_pads_with_zeros(layout: torch.memory_format) -> None:
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=layout).requires_grad_()
    y = ZeroPadShortcut(4, 8, stride=2)(x)
    assert torch.autograd.grad(y.sum(), x)[0].is_contiguous(memory_format=layout)
    assert y.shape == (2, 8, 3, 3)
    torch.testing.assert_close(y[:, 2:6], x[:, :, ::2, ::2], rtol=0, atol=0)
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


@pytest.mark.parametrize(("activation", "second_moment"), [("relu", 0.5), ("trelu", 1.0)])
def test_cifar_resnet_is_initialised_as_by_he_et_al(activation: Any, second_moment: float) -> None:
    weight = CifarResNet(20, activation=activation).layer3[1].conv1.weight
    # 36,864 samples: the estimate of a standard deviation has a relative error of 0.4 %.
    expected = (1 / (second_moment * 64 * 9)) ** 0.5
    assert weight.std().item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("make", "count"), [(partial(CifarResNet, 20), 19), (partial(VGG, 11), 8)])
def test_activation_leaves_the_keys(make: Any, count: int) -> None:
    plain, translated = make(), make(activation="trelu")
    types = [Counter(map(type, net.modules())) for net in (plain, translated)]
    assert types[0][nn.ReLU] == types[1][TReLU] == count
    assert types[0][TReLU] == types[1][nn.ReLU] == 0
    assert list(plain.state_dict()) == list(translated.state_dict())
    with pytest.raises(InputError, match=r"activation is 'relu' or 'trelu', got 'trulu'\. Did you"):
        make(activation="trulu")


@pytest.mark.parametrize("activation", ["relu", "trelu"])
def test_cifar_resnet_trains_every_parameter(activation: Any) -> None:
    net = CifarResNet(20, activation=activation)
    net(torch.randn(4, 3, 32, 32)).logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


THEIRS = {ResNet18: torchvision.models.resnet18, ResNet50: torchvision.models.resnet50}

PARAMETERS = {ResNet18: 11_689_512, ResNet50: 25_557_032}  # published


@pytest.mark.parametrize("ours", THEIRS)
def test_imagenet_resnet_equals_torchvisions(ours: type[nn.Module]) -> None:
    torch.manual_seed(0)
    theirs = THEIRS[ours](num_classes=7)  # type: ignore[index]
    torch.manual_seed(0)
    net = ours(num_classes=7)
    assert str(net).removeprefix(ours.__name__) == str(theirs).removeprefix("ResNet")
    assert list(net.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], tensor, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("ours", THEIRS)
def test_imagenet_resnet_has_1000_classes_by_default(ours: type[nn.Module]) -> None:
    with torch.device("meta"):
        net = ours()
        assert sum(q.numel() for q in net.parameters()) == PARAMETERS[ours]  # type: ignore[index]
    assert ours(num_classes=7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert {type(m) for m in net.modules() if "Norm" in type(m).__name__} == {nn.BatchNorm2d}


@pytest.mark.parametrize(
    ("make", "last", "blocks", "factor"),
    [(partial(CifarResNet, 20), "conv2.weight", 9, 1 / 3), (ResNet50, "conv3.weight", 16, 1 / 4)],
    ids=["resnet20", "resnet50"],
)
def test_resnet_scales_its_branches(make: Any, last: str, blocks: int, factor: float) -> None:
    nets = []
    for scale_branches in (False, True):
        torch.manual_seed(0)
        nets.append(make(num_classes=7, scale_branches=scale_branches).state_dict())
    plain, scaled = nets
    assert sum(name.endswith(last) for name in plain) == blocks
    for name, weight in plain.items():
        expected = weight * factor if name.endswith(last) else weight
        torch.testing.assert_close(scaled[name], expected, msg=name)


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_vgg_features_equal_torchvisions(depth: int) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"vgg{depth}_bn")(init_weights=False).features
        ours = VGG(depth).features
    assert [type(layer) for layer in ours] == [type(layer) for layer in theirs]
    shapes = [m.weight.shape for m in theirs if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    assert [m.weight.shape for m in ours if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))] == shapes


def test_vgg_refuses_another_depth() -> None:
    with pytest.raises(InputError, match="no VGG of depth 12: choose 11, 13, 16 or 19"):
        VGG(12)


def test_vgg_width() -> None:
    net = VGG(11, width=16)
    widths = [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [16, 32, 64, 64, 128, 128, 128, 128]
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(InputError, match="width must be a whole number of at least 1, got 0"):
        VGG(11, width=0)
