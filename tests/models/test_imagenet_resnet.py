"""ResNet18 and ResNet50 against torchvision's."""

import pytest
import torch
import torchvision
from torch import nn

from nmlightning.models.resnet import ResNet18, ResNet50

THEIRS = {ResNet18: torchvision.models.resnet18, ResNet50: torchvision.models.resnet50}
PARAMETERS = {ResNet18: 11_689_512, ResNet50: 25_557_032}  # published


def draw(scale_branches: bool) -> ResNet50:
    torch.manual_seed(0)
    return ResNet50(num_classes=7, scale_branches=scale_branches)


@pytest.mark.parametrize("ours", THEIRS)
def test_it_is_torchvisions_network(ours: type[nn.Module]) -> None:
    torch.manual_seed(0)
    theirs = THEIRS[ours](num_classes=7)  # type: ignore[index]
    torch.manual_seed(0)
    net = ours(num_classes=7)
    assert str(net).removeprefix(ours.__name__) == str(theirs).removeprefix("ResNet")
    assert list(net.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], tensor, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("ours", THEIRS)
def test_it_has_imagenets_classes_unless_told_otherwise(ours: type[nn.Module]) -> None:
    with torch.device("meta"):
        net = ours()
        assert sum(q.numel() for q in net.parameters()) == PARAMETERS[ours]  # type: ignore[index]
    assert ours(num_classes=7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert {type(m) for m in net.modules() if "Norm" in type(m).__name__} == {nn.BatchNorm2d}


def test_scaled_branches_add_up_to_one() -> None:
    plain, scaled = (draw(scale_branches).state_dict() for scale_branches in (False, True))
    assert sum(name.endswith("conv3.weight") for name in plain) == 16
    for name, weight in plain.items():
        factor = 1 / 4 if name.endswith("conv3.weight") else 1
        torch.testing.assert_close(scaled[name], weight * factor, rtol=0, atol=0, msg=name)
