"""DecayEquivalentLR against SGD with weight decay."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nmlightning.errors import InputError
from nmlightning.optim.decay_equivalent_lr import DecayEquivalentLR, DecayRate
from nmlightning.weights.channel_norms import channel_norms

Train = Callable[..., None]
MakeNet = Callable[[], nn.Module]
CONVOLUTIONS = ("conv1.weight", "conv2.weight")
DECAY = 0.02
SCHEDULES: dict[str, Callable[[int], float]] = {
    "constant": lambda _: 0.02,
    "steps": lambda step: 0.05 / 10 ** (step // 100),
    "rising": lambda step: 0.001 * (1 + step // 60),
    "cosine": lambda step: 0.025 * (1 + math.cos(math.pi * step / 300)),
    "pauses": lambda step: 0.0 if 100 <= step < 120 else 0.02,
    "warm-up from 0": lambda step: min(0.02, 0.001 * step),
}


def groups(net: nn.Module, decay: float) -> list[dict[str, Any]]:
    steered = [net.get_parameter(name) for name in CONVOLUTIONS]
    rest = [q for name, q in net.named_parameters() if name not in CONVOLUTIONS]
    return [{"params": steered, "weight_decay": decay}, {"params": rest, "weight_decay": 1e-3}]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_directions_match_weight_decay(
    make_net: MakeNet, train: Train, schedule: str, momentum: float
) -> None:
    decayed, equivalent = make_net(), make_net()
    optimizers = [
        torch.optim.SGD(groups(net, decay), lr=SCHEDULES[schedule](0), momentum=momentum)
        for net, decay in ((decayed, DECAY), (equivalent, 0.0))
    ]
    DecayEquivalentLR(DECAY).attach(optimizers[1], equivalent.named_parameters())
    for net, optimizer in zip((decayed, equivalent), optimizers, strict=True):
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: SCHEDULES[schedule](step) / (SCHEDULES[schedule](0) or 1)
        )
        if not SCHEDULES[schedule](0):
            scheduler.base_lrs = [1.0] * len(optimizer.param_groups)
        train(net, optimizer, 300, each=lambda _, scheduler=scheduler: scheduler.step())
    for name in CONVOLUTIONS:
        one, other = (net.get_parameter(name).detach().flatten(1) for net in (decayed, equivalent))
        directions = [w / w.norm(dim=1, keepdim=True) for w in (one, other)]
        torch.testing.assert_close(*directions, rtol=0, atol=1e-8)
    torch.testing.assert_close(decayed.head.weight, equivalent.head.weight, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("without", [range(3), range(20, 30), range(0, 60, 2)])
def test_steps_without_a_gradient(make_net: MakeNet, without: range) -> None:
    """SGD leaves a weight without a gradient alone, and does not decay it either."""
    nets = [make_net(), make_net()]
    optimizers = [
        torch.optim.SGD(groups(net, decay), lr=0.02, momentum=0.9)
        for net, decay in zip(nets, (DECAY, 0.0), strict=True)
    ]
    DecayEquivalentLR(DECAY).attach(optimizers[1], nets[1].named_parameters())
    for step in range(60):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 2, 8, 8, dtype=torch.float64, generator=generator)
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            net(x).logsumexp(1).mean().backward()
            if step in without:
                net.conv1.weight.grad = None
            optimizer.step()
    one, other = (net.conv1.weight.detach().flatten(1) for net in nets)
    directions = [w / w.norm(dim=1, keepdim=True) for w in (one, other)]
    torch.testing.assert_close(*directions, rtol=0, atol=1e-8)


def test_decay_keeps_norms(make_net: MakeNet, train: Train) -> None:
    net = make_net()
    optimizer = torch.optim.SGD(groups(net, 0.0), lr=0.05, momentum=0.5)
    initial = channel_norms(net.conv1.weight)
    DecayEquivalentLR(1.0).attach(optimizer, net.named_parameters())

    def check(_: int) -> None:
        torch.testing.assert_close(channel_norms(net.conv1.weight), initial, rtol=1e-12, atol=0)

    train(net, optimizer, 300, each=check)  # α^(−300) is about 1e13


def test_running_statistics_follow_decay(make_net: MakeNet, train: Train) -> None:
    """Were the weights to grow by a tenth a step, these would be a third of the batch's."""
    net = make_net()
    optimizer = torch.optim.SGD(groups(net, 0.0), lr=0.05, momentum=0.5)
    DecayEquivalentLR(1.0).attach(optimizer, net.named_parameters())
    train(net, optimizer, 40)
    x = torch.randn(64, 2, 8, 8, dtype=torch.float64)
    ratios = net.norm1.running_var / net.conv1(x).var((0, 2, 3))
    assert ratios.mean().item() == pytest.approx(1, abs=0.2)


def test_channel_without_gradient_is_not_skipped(make_net: MakeNet) -> None:
    net = make_net()
    optimizer = torch.optim.SGD(groups(net, 0.0), lr=0.05, momentum=0.5)
    handle = DecayEquivalentLR(1.0).attach(optimizer, net.named_parameters())
    before = net.conv1.weight.detach().clone()
    for _ in range(3000):  # a² is below the smallest float64
        net.conv1.weight.grad = torch.zeros_like(net.conv1.weight)
        optimizer.step()
    assert handle.skipped == 0
    torch.testing.assert_close(net.conv1.weight.detach(), before, rtol=1e-9, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("rate", [0.0, 1e-12, 1e-3, 0.002])
def test_decay_rate(rate: float, momentum: float) -> None:
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


@pytest.mark.parametrize("decay", [-1.0, math.inf, math.nan])
def test_bad_weight_decay_is_refused(decay: float) -> None:
    with pytest.raises(InputError, match=f"weight_decay must be 0 or more, got {decay}"):
        DecayEquivalentLR(decay)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda q: torch.optim.Adam(q), "exact for SGD only, got Adam"),
        (lambda q: torch.optim.SGD(q, momentum=0.9, nesterov=True), "got nesterov=True"),
        (lambda q: torch.optim.SGD(q, momentum=0.9, dampening=0.1), "got dampening=0.1"),
        (lambda q: torch.optim.SGD(q, maximize=True), "got maximize=True"),
    ],
)
def test_optimizers_without_heavy_ball_are_refused(
    make_net: MakeNet, make: Any, message: str
) -> None:
    net = make_net()
    with pytest.raises(InputError, match=message):
        DecayEquivalentLR(DECAY).attach(make(net.parameters()), net.named_parameters())
