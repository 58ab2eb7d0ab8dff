from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmlightning.optim import (
    DecayEquivalentLR,
    Hyperball,
    LRCorrection,
    NormSchedule,
    RadialProjection,
)
from nmlightning.weights.channel_norms import channel_norms
from nmlightning.weights.history import NormHistory

MakeRule = Callable[..., Any]
RULES: dict[str, MakeRule] = {
    "stable": lambda history, **options: LRCorrection(history, **options),
    "paper": lambda history, **options: LRCorrection(history, mode="paper", **options),
    "layer": lambda history, **options: LRCorrection(history, granularity="layer", **options),
    "schedule": lambda history, **options: NormSchedule(history, **options),
    "decay": lambda _, **options: DecayEquivalentLR(0.01, **options),
    "hyperball": lambda _, **options: Hyperball(**options),
    "projection": lambda _, **options: RadialProjection(**options),
}


@pytest.fixture(params=RULES)
def rule_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_rule(rule_name: str) -> MakeRule:
    """Each rule, from the history of norms that it follows, if it follows one."""
    return RULES[rule_name]


class InvariantNet(nn.Module):
    """Two convolutions under batch norms with next to no eps: scale-invariant in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, bias=False)
        self.norm1 = nn.BatchNorm2d(4, eps=1e-30)
        self.conv2 = nn.Conv2d(4, 5, 3, bias=False)
        self.norm2 = nn.BatchNorm2d(5, eps=1e-30)
        self.head = nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def make_net() -> Callable[[], InvariantNet]:
    def make() -> InvariantNet:
        torch.manual_seed(0)
        return InvariantNet()

    return make


@pytest.fixture
def train() -> Callable[..., None]:
    """Take steps on the same data for every run."""

    def run(
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int,
        first: int = 0,
        each: Callable[[int], None] = lambda _: None,
    ) -> None:
        for step in range(first, first + steps):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(8, 2, 8, 8, dtype=torch.float64, generator=generator)
            target = torch.randint(3, (8,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(net(x), target).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            each(step)

    return run


@pytest.fixture
def random_history() -> Callable[..., NormHistory]:
    """Recorded norms of ten epochs of ten steps, somewhere near those of a net's convolutions."""

    def make(net: nn.Module) -> NormHistory:
        generator = torch.Generator().manual_seed(1)
        norms = {}
        for name, weight in net.named_parameters():
            if weight.dim() == 4:
                initial = channel_norms(weight).float()
                change = 0.5 + torch.rand(10, len(initial), generator=generator)
                norms[name] = (initial * change).numpy()
        return NormHistory.from_arrays(norms, range(10, 101, 10), range(10))

    return make
