"""DecayEquivalentLR against SGD with weight decay."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from nmlightning.errors import InputError
from nmlightning.optim.decay_equivalent_lr import DecayEquivalentLR, DecayRate
from optim_rules import CONVOLUTIONS, draw_batch, make_net, split_groups, train

DECAY = 0.02
SCHEDULES: dict[str, Callable[[int], float]] = {
    "constant": lambda _: 0.02,
    "steps": lambda step: 0.05 / 10 ** (step // 100),
    "rising": lambda step: 0.001 * (1 + step // 60),
    "cosine": lambda step: 0.025 * (1 + math.cos(math.pi * step / 300)),
    "pauses": lambda step: 0.0 if 100 <= step < 120 else 0.02,
    "warm-up from 0": lambda step: min(0.02, 0.001 * step),
}


def make_optimizers(
    nets: list[nn.Module], lr: float = 0.02, momentum: float = 0.9
) -> list[torch.optim.SGD]:
    """Return one with weight decay, and one under the rule, which replaces it."""
    optimizers = [
        torch.optim.SGD(split_groups(net, decay, 1e-3), lr=lr, momentum=momentum)
        for net, decay in zip(nets, (DECAY, 0.0), strict=True)
    ]
    DecayEquivalentLR(DECAY).attach(optimizers[1], nets[1].named_parameters())
    return optimizers


def assert_same_directions(nets: list[nn.Module], name: str) -> None:
    weights = (net.get_parameter(name).detach().flatten(1) for net in nets)
    directions = [w / w.norm(dim=1, keepdim=True) for w in weights]
    torch.testing.assert_close(*directions, rtol=0, atol=1e-8)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_directions_match_weight_decay(schedule: str, momentum: float) -> None:
    nets = [make_net(), make_net()]
    for net, optimizer in zip(
        nets, make_optimizers(nets, SCHEDULES[schedule](0), momentum), strict=True
    ):
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: SCHEDULES[schedule](step) / (SCHEDULES[schedule](0) or 1)
        )
        if not SCHEDULES[schedule](0):
            scheduler.base_lrs = [1.0] * len(optimizer.param_groups)
        train(net, optimizer, 300, each=lambda _, scheduler=scheduler: scheduler.step())
    for name in CONVOLUTIONS:
        assert_same_directions(nets, name)
    heads = [net.head.weight for net in nets]
    torch.testing.assert_close(*heads, rtol=1e-8, atol=1e-8)


def after_each_backward(nets: list[nn.Module]) -> Iterator[tuple[int, Any, torch.optim.SGD]]:
    """Train by `make_optimizers`; give what is about to step."""
    optimizers = make_optimizers(nets)
    for step in range(60):
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            net(draw_batch(step)[0]).logsumexp(1).mean().backward()
            yield step, net, optimizer
            optimizer.step()


@pytest.mark.parametrize("without", [range(3), range(20, 30), range(0, 60, 2)])
def test_steps_without_a_gradient_do_not_decay(without: range) -> None:
    """SGD leaves a weight without a gradient alone."""
    nets = [make_net(), make_net()]
    for step, net, _ in after_each_backward(nets):
        if step in without:
            net.conv1.weight.grad = None
    assert_same_directions(nets, "conv1.weight")


@pytest.mark.filterwarnings("ignore:.* skipped . steps of channels of conv1.weight by step 25")
def test_steps_after_a_skipped_one_decay() -> None:
    """A skipped step is one that weight decay did not take either, its momentum empty."""
    nets = [make_net(), make_net()]
    for step, net, optimizer in after_each_backward(nets):
        if step == 20 and net is nets[0]:
            optimizer.state[net.conv1.weight]["momentum_buffer"].zero_()
            net.conv1.weight.grad = None
        elif step == 20:
            net.conv1.weight.grad.fill_(torch.nan)
    assert_same_directions(nets, "conv1.weight")


def test_channel_without_gradient_is_not_skipped() -> None:
    net = make_net()
    optimizer = torch.optim.SGD(split_groups(net, 0.0, 1e-3), lr=0.05, momentum=0.5)
    handle = DecayEquivalentLR(1.0).attach(optimizer, net.named_parameters())
    before = net.conv1.weight.detach().clone()
    for _ in range(3000):  # a² is below the smallest float64
        net.conv1.weight.grad = torch.zeros_like(net.conv1.weight)
        optimizer.step()
    assert handle.skipped == 0
    torch.testing.assert_close(net.conv1.weight.detach(), before, rtol=1e-9, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("rate", [0.0, 1e-12, 1e-3, 0.002])
def test_decay_rate_solves_its_equation(rate: float, momentum: float) -> None:
    decay = 1.0
    found = DecayRate.of(rate, decay, momentum)
    z = found.alpha
    assert z**2 - (1 + momentum - rate * decay) * z + momentum == pytest.approx(0, abs=1e-15)
    assert z >= math.sqrt(momentum)
    if rate > 1e-6:
        assert found.pull == pytest.approx((1 - z) / (rate * z), rel=1e-9)
    else:
        assert found.pull == pytest.approx(decay / (1 - momentum), rel=1e-9)


def test_oscillating_decay_is_refused() -> None:
    limit = (1 - math.sqrt(0.9)) ** 2
    DecayRate.of(limit * 0.999, 1.0, 0.9)
    with pytest.raises(InputError, match=r"weight decay 1 at learning rate 0.1 and momentum 0.9"):
        DecayRate.of(0.1, 1.0, 0.9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda q: torch.optim.Adam(q), "exact for SGD only, got Adam"),
        (lambda q: torch.optim.SGD(q, momentum=0.9, nesterov=True), "got nesterov=True"),
        (lambda q: torch.optim.SGD(q, momentum=0.9, dampening=0.1), "got dampening=0.1"),
        (lambda q: torch.optim.SGD(q, maximize=True), "got maximize=True"),
    ],
)
def test_optimizers_without_heavy_ball_are_refused(make: Any, message: str) -> None:
    net = make_net()
    with pytest.raises(InputError, match=message):
        DecayEquivalentLR(DECAY).attach(make(net.parameters()), net.named_parameters())
