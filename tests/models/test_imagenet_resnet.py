"""ResNet50 against torchvision's."""

import torch
import torchvision
from torch import nn

from nmlightning.models.resnet50 import ResNet50


def draw(scale_branches: bool) -> ResNet50:
    torch.manual_seed(0)
    return ResNet50(num_classes=7, scale_branches=scale_branches)


def test_it_is_torchvisions_network() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(num_classes=7)
    ours = draw(scale_branches=False)
    assert str(ours).removeprefix("ResNet50") == str(theirs).removeprefix("ResNet")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=0, atol=0, msg=name)


def test_it_has_imagenets_classes_unless_told_otherwise() -> None:
    with torch.device("meta"):
        net = ResNet50()
        assert sum(parameter.numel() for parameter in net.parameters()) == 25_557_032  # published
    assert draw(scale_branches=True)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert {type(m) for m in net.modules() if "Norm" in type(m).__name__} == {nn.BatchNorm2d}


def test_scaled_branches_add_up_to_one() -> None:
    plain, scaled = (draw(scale_branches).state_dict() for scale_branches in (False, True))
    assert sum(name.endswith("conv3.weight") for name in plain) == 16
    for name, weight in plain.items():
        factor = 1 / 4 if name.endswith("conv3.weight") else 1
        torch.testing.assert_close(scaled[name], weight * factor, rtol=0, atol=0, msg=name)
