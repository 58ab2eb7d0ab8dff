import pytest
import torch
from torch import Tensor, nn


@pytest.fixture
def net() -> nn.Sequential:
    """Two convolutions, each before a batch norm, the second pair in a Sequential of its own."""
    first = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-3, momentum=0.2), nn.ReLU()]
    return nn.Sequential(*first, nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 8, 8)
