"""The rules that follow a recording, against a port in numpy: 50 steps of Nesterov's SGD."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from nmlightning.optim import LRCorrection, NormSchedule
from nmlightning.weights.history import NormHistory

MakeNet = Callable[[], nn.Module]
Array = NDArray[np.float64]
STEPS, RATE, MOMENTUM, BOUND = 50, 0.02, 0.9, 0.2
CONVOLUTIONS = ("conv1.weight", "conv2.weight")
RULES: dict[str, Callable[[NormHistory], Any]] = {
    "stable channel": lambda r: LRCorrection(r),
    "stable layer": lambda r: LRCorrection(r, granularity="layer"),
    "paper channel": lambda r: LRCorrection(r, mode="paper"),
    "paper layer": lambda r: LRCorrection(r, mode="paper", granularity="layer"),
    "schedule": lambda r: NormSchedule(r),
}


def rate_of(step: int) -> float:
    """What StepLR(step_size=20, gamma=0.3) makes of it; no power of two."""
    return RATE * 0.3 ** (step // 20)


class Port:
    """A net's weights and momenta in numpy, and the rule written out for one channel at a time."""

    def __init__(self, rule: str, net: nn.Module, history: NormHistory) -> None:
        self.rule, self.history = rule, history
        self.weights = {n: q.detach().numpy() for n, q in net.named_parameters()}
        self.buffers = {n: np.zeros_like(w) for n, w in self.weights.items()}
        self.initial = {
            n: [math.sqrt((v * v).sum()) for v in self.weights[n]] for n in CONVOLUTIONS
        }

    def recorded(self, name: str, step: int) -> Array:
        rows = self.history.norms[name].astype(np.float64)
        if self.rule.startswith("paper"):
            return np.asarray(rows[step // 10])
        return np.array([np.interp(step, self.history.steps, column) for column in rows.T])

    def step(self, gradients: dict[str, Array], step: int) -> None:
        for name, weight in self.weights.items():
            buffer = self.buffers[name]
            buffer[:] = MOMENTUM * buffer + gradients[name]
            delta = -rate_of(step) * (gradients[name] + MOMENTUM * buffer)
            if name not in CONVOLUTIONS:
                weight += delta
                continue
            norms = self.recorded(name, step)
            current = np.array([math.sqrt((v * v).sum()) for v in weight])
            for channel, factor in enumerate(self.factors(name, current, norms, step)):
                self.move(name, channel, delta[channel] * factor, norms[channel], step)

    def factors(self, name: str, current: Array, norms: Array, step: int) -> Array:
        if self.rule == "schedule":
            return np.full_like(norms, RATE / rate_of(step))
        own = current if self.rule.startswith("paper") else np.array(self.initial[name])
        if self.rule.endswith("layer"):
            return np.full_like(norms, (own * own).sum() / (norms * norms).sum())
        return own * own / (norms * norms)

    def move(self, name: str, channel: int, delta: Array, norm: float, step: int) -> None:
        weight, buffer = self.weights[name][channel], self.buffers[name][channel]
        if self.rule.startswith("paper"):
            weight += delta
            return
        target = norm * math.sqrt(RATE / rate_of(step))
        if self.rule.startswith("stable"):
            target = self.initial[name][channel]
        limit = BOUND * math.sqrt((weight * weight).sum())
        weight += delta * min(1.0, limit / math.sqrt((delta * delta).sum()))
        scale = target / math.sqrt((weight * weight).sum())
        weight *= scale
        buffer /= scale


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 2, 8, 8, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (8,), generator=generator)


@pytest.mark.filterwarnings("ignore:LRCorrection.mode=.paper.. has no brake")
@pytest.mark.parametrize("rule", RULES)
def test_rules_match_port_to_1e_12(
    make_net: MakeNet, random_history: Callable[[nn.Module], NormHistory], rule: str
) -> None:
    ours, theirs = make_net(), make_net()
    history = random_history(ours)
    optimizer = torch.optim.SGD(ours.parameters(), lr=RATE, momentum=MOMENTUM, nesterov=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.3)
    RULES[rule](history).attach(optimizer, ours.named_parameters())
    port, parameters = Port(rule, theirs, history), dict(theirs.named_parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        x, target = batch(step)
        F.cross_entropy(ours(x), target).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        loss = F.cross_entropy(theirs(x), target)
        found = torch.autograd.grad(loss, list(parameters.values()))
        port.step({n: g.numpy() for n, g in zip(parameters, found, strict=True)}, step)
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight, parameters[name], rtol=1e-12, atol=1e-12, msg=name)
