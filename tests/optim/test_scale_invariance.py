"""How many gradients it takes to say whether the loss feels the norm of a weight."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nmlightning.optim import DecayEquivalentLR
from nmlightning.optim.scope import CHANCE, TOLERANCE, share_limit
from nmlightning.optim.step_hooks import StepHookHandle

Forward = Callable[[Tensor], Tensor]


def attach(
    seed: int, after: Forward, channels: int = 1
) -> tuple[StepHookHandle, Callable[[], None]]:
    """Return the rule at work on a 1×1 convolution, and what takes a step."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(32, channels, 1, bias=False)
    optimizer = torch.optim.SGD(conv.parameters(), lr=1e-3)
    handle = DecayEquivalentLR(0.01).attach(optimizer, conv.named_parameters())

    def step() -> None:
        optimizer.zero_grad()
        x, target = torch.randn(4, 32, 3, 3), torch.rand(4, channels, 3, 3)
        (after(conv(x)) - target).square().mean().backward()
        optimizer.step()

    return handle, step


def normalise(x: Tensor) -> Tensor:
    return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)


def test_one_channel_is_not_steered_by_luck() -> None:
    """One gradient of one channel is across the weight within a tenth in 8 % of all cases."""
    steered = []
    for seed in range(300):
        handle, step = attach(seed, torch.sigmoid)
        for _ in range(6):
            step()
            steered.append(bool(handle.factors()))
        assert handle.measured
        assert list(handle.scope.dropped()) == ["weight"]
    assert not any(steered)


@pytest.mark.parametrize("channels", [1, 2, 32])
def test_what_is_scale_invariant_is_steered_from_the_first_step(channels: int) -> None:
    for seed in range(20):
        handle, step = attach(seed, normalise, channels)
        step()
        assert handle.measured
        assert bool(handle.factors())
        assert handle.reasons()["weight"].startswith("steered: scale-invariant (radial share")


def across(conv: nn.Parameter, share: float) -> Tensor:
    """Return a gradient of a given radial share."""
    w = conv.detach().flatten(1)
    other = torch.randn_like(w)
    other -= (other * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True) * w
    cosine = share / math.sqrt(w.shape[1])
    unit = w / w.norm(dim=1, keepdim=True) * cosine
    return (unit + other / other.norm(dim=1, keepdim=True) * math.sqrt(1 - cosine**2)).view_as(conv)


def test_what_may_be_chance_waits_for_more_gradients() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(2, 32, 1, 1))

    def start() -> tuple[StepHookHandle, torch.optim.Optimizer]:
        optimizer = torch.optim.SGD([weight], lr=1e-4)
        return DecayEquivalentLR(0.01).attach(optimizer, [("weight", weight)]), optimizer

    handle, optimizer = start()
    weight.grad = across(weight, 0.05)
    optimizer.step()
    assert not handle.measured
    assert not handle.factors()
    reason = handle.reasons()["weight"]
    assert reason == "left so far: a radial share of 5.0e-02 in 2 channels' gradients may be chance"
    optimizer.step()

    resumed, optimizer = start()
    resumed.load_state_dict(handle.state_dict())
    assert not resumed.measured
    weight.grad = across(weight, 0.05)
    optimizer.step()
    assert resumed.measured
    assert bool(resumed.factors())


def test_a_gradient_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured before it is clipped, and again in the step; or in a step that is not taken."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(1, 32, 1, 1))
    optimizer = torch.optim.SGD([weight], lr=1e-4)
    handle = DecayEquivalentLR(0.01).attach(optimizer, [("weight", weight)])
    for count in (1, 2):
        weight.grad = across(weight, 0.9)
        handle.measure()  # of a step that a GradScaler leaves out
        weight.grad = across(weight, 0.09)
        handle.measure()
        weight.grad = weight.grad.clamp(-1e-3, 1e-3)
        optimizer.step()
        assert handle.scope.samples["weight"] == count
        assert handle.scope.shares["weight"] == pytest.approx(0.09, rel=1e-3)


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5])
def test_limits_are_passed_by_chance_as_rarely_as_they_say(samples: int) -> None:
    """By the chi-squared distribution of a sum of squared normal cosines."""
    half = torch.tensor(samples / 2, dtype=torch.float64)
    chance = torch.special.gammainc(half, half * share_limit(samples) ** 2)
    assert 0.5 * CHANCE < chance <= CHANCE
    assert share_limit(samples) < share_limit(samples + 1) <= share_limit(6) == TOLERANCE
