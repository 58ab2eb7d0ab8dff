"""A small net with a convolution of each kind, and data for it; each test by both backends."""

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def _formula(_backend: None) -> None:
    """In the place of the formula alone."""


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, groups=2)]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
