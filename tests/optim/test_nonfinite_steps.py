"""Every rule under norms, steps and gradients that are not finite, and what is left of them."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nmlightning.errors import InputError
from nmlightning.optim import DecayEquivalentLR, LRCorrection, NormSchedule
from nmlightning.optim.nonfinite_steps import MAX_SKIPPED_STEPS
from nmlightning.weights.channel_norms import channel_norms
from nmlightning.weights.history import NormHistory

Train = Callable[..., None]
MakeNet = Callable[[], nn.Module]
MakeHistory = Callable[[nn.Module], NormHistory]
MakeRule = Callable[..., Any]
REFERENCED = ("stable", "paper", "layer", "schedule")


def sgd(net: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), **{"lr": 0.02, "momentum": 0.9, **options})


def step_on(optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.step()


def spoil(net: nn.Module, channel: int) -> None:
    """Leave gradients of zero, but NaN in one channel."""
    for q in net.parameters():
        q.grad = torch.zeros_like(q)
    net.conv1.weight.grad[channel, 0, 1, 1] = torch.nan


def across(weight: Tensor) -> Tensor:
    """Return a gradient across the weight, as where the loss feels no norm."""
    grad = torch.zeros_like(weight)
    grad[:, 0, 0, 0] = weight[:, 0, 0, 1].detach()
    grad[:, 0, 0, 1] = -weight[:, 0, 0, 0].detach()
    return grad


@pytest.mark.parametrize("rule_name", REFERENCED)
@pytest.mark.parametrize("dead", [0.0, torch.nan, torch.inf])
def test_dead_channels_are_not_steered(
    make_net: MakeNet, train: Train, random_history: MakeHistory, make_rule: MakeRule, dead: float
) -> None:
    net, plain = make_net(), make_net()
    history = random_history(net)
    history.norms["conv1.weight"][:, 1] = dead
    optimizer, other = sgd(net), sgd(plain)
    optimizer.param_groups[0]["initial_lr"] = 0.1  # a schedule is on its way
    handle = make_rule(history).attach(optimizer, net.named_parameters())
    with pytest.warns(UserWarning, match=r"1 of 4 channels of conv1.weight have a recorded norm"):
        train(net, optimizer, 1)
    train(plain, other, 1)
    moved = torch.isclose(net.conv1.weight, plain.conv1.weight, rtol=1e-12).flatten(1).all(1)
    assert moved.tolist() == [False, True, False, False]
    ours, theirs = optimizer.state[net.conv1.weight], other.state[plain.conv1.weight]
    torch.testing.assert_close(ours["momentum_buffer"][1], theirs["momentum_buffer"][1])
    train(net, optimizer, 9, first=1)
    assert all(bool(q.isfinite().all()) for q in net.parameters())
    assert handle.skipped == 0


def test_nonfinite_step_is_skipped_with_a_warning(
    make_net: MakeNet,
    train: Train,
    random_history: MakeHistory,
    make_rule: MakeRule,
    rule_name: str,
) -> None:
    net = make_net()
    optimizer = sgd(net)
    handle = make_rule(random_history(net)).attach(optimizer, net.named_parameters())
    train(net, optimizer, 1)
    before = net.conv1.weight.detach().clone()
    spoil(net, channel=2)
    optimizer.step()
    torch.testing.assert_close(net.conv1.weight[2], before[2])
    assert bool(net.conv1.weight.isfinite().all())
    channels = 4 if rule_name == "hyperball" else 1  # that undoes the step of a whole weight
    assert handle.skipped == channels
    handle.clock = lambda: {"epoch": 0}
    undone = f"skipped {24 * channels} steps of channels of conv1.weight"
    message = f"{undone} by step 25, since they, their gradients"
    with pytest.warns(UserWarning, match=message):
        step_on(optimizer, 23)


@pytest.mark.filterwarnings("ignore:.* skipped .* steps of channels of")
def test_run_stops_after_nonfinite_gradients(
    make_net: MakeNet,
    train: Train,
    random_history: MakeHistory,
    make_rule: MakeRule,
    rule_name: str,
) -> None:
    net = make_net()
    optimizer = sgd(net)
    handle = make_rule(random_history(net)).attach(optimizer, net.named_parameters())
    handle.clock = lambda: {"epoch": 0}
    train(net, optimizer, 1)
    spoil(net, channel=2)
    step_on(optimizer, 123)
    channels = 4 if rule_name == "hyperball" else 1
    message = (
        "had to skip the steps of conv1.weight 124 times in a row "
        f"(now of {channels} channels): their gradients are not finite. Find the operation that "
        "makes them so"
    )
    assert 100 <= MAX_SKIPPED_STEPS <= 124  # it looks at every 25th
    with pytest.raises(InputError, match=re.escape(message)):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:.* skipped .* steps of channels of")
def test_run_stops_after_nonfinite_factors(make_net: MakeNet, random_history: MakeHistory) -> None:
    net = make_net().float()
    history = random_history(net)
    history.norms["conv1.weight"][:] = 1e-44
    optimizer = torch.optim.SGD([net.conv1.weight], lr=0.02)
    handle = LRCorrection(history).attach(optimizer, net.named_parameters())
    handle.clock = lambda: {"epoch": 0}
    net.conv1.weight.grad = across(net.conv1.weight)
    with pytest.raises(InputError, match="steps or factors are not finite, so the run has diverg"):
        step_on(optimizer, 125)


@pytest.mark.parametrize("rule_name", ["stable", "paper", "layer"])
def test_nonfinite_factor_skips_the_step(
    make_net: MakeNet, random_history: MakeHistory, make_rule: MakeRule
) -> None:
    """A recorded norm so small that nothing in float32 can be divided by it."""
    net = make_net().float()
    history = random_history(net)
    history.norms["conv1.weight"][:] = 1e-44
    optimizer = sgd(net)
    handle = make_rule(history).attach(optimizer, net.named_parameters())
    before = net.conv1.weight.detach().clone()
    for name, q in net.named_parameters():
        q.grad = torch.zeros_like(q)
        if name.startswith("conv"):
            q.grad = across(q)
    optimizer.step()
    assert handle.skipped == len(before)
    torch.testing.assert_close(net.conv1.weight.detach(), before)


@pytest.mark.parametrize(
    ("dtype", "shrink", "gradient"),
    [
        # A factor of 1e36, which float32 holds, on steps of a thousand, whose product it does not.
        (torch.float32, 1e-18, 1e6),
        # A factor of 1e6, which half precision holds no more than its product with a step of one.
        (torch.float16, 1e-3, 1e3),
    ],
)
def test_a_product_that_the_weights_cannot_hold(
    dtype: torch.dtype, shrink: float, gradient: float
) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 3, 3, 3).to(dtype))
    before = weight.detach().clone()
    norms = channel_norms(weight)[None] * shrink
    history = NormHistory.from_arrays({"c": norms.numpy()}, [10], [0])
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    rule = LRCorrection(history, mode="paper", include=["c*"])
    handle = rule.attach(optimizer, [("c", weight)])
    weight.grad = across(weight) * gradient
    optimizer.step()
    assert handle.skipped == 4
    assert torch.equal(weight, before)


def test_a_factor_that_half_precision_does_not_hold() -> None:
    """Its product with a small step is an ordinary number."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 3, 3, 3).half())
    with torch.no_grad():
        weight[:, 0, 0, 0] = 0.0  # next to which half precision has small numbers
    norms = channel_norms(weight)
    history = NormHistory.from_arrays({"c": norms[None].numpy() * 1e-3}, [10], [0])
    optimizer = torch.optim.SGD([weight], lr=0.125)
    rule = LRCorrection(history, mode="paper", include=["c*"])
    handle = rule.attach(optimizer, [("c", weight)])
    weight.grad = torch.zeros_like(weight)
    weight.grad[:, 0, 0, 0] = 2.0**-17
    optimizer.step()
    assert handle.skipped == 0
    moved = weight[:, 0, 0, 0].detach().float()
    torch.testing.assert_close(moved, torch.full((4,), -1e6 * 2.0**-20), rtol=1e-3, atol=0)


def test_a_norm_that_half_precision_does_not_reach() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 1, 1, 1).half())
    before = weight.detach().clone()
    history = NormHistory.from_arrays({"c": [[1e6] * 4]}, [10], [0])
    optimizer = torch.optim.SGD([weight], lr=0.1)
    NormSchedule(history, include=["c"]).attach(optimizer, [("c", weight)])
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, before)


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.0, "amsgrad": True}),
    "RMSprop": (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:LRCorrection.mode=.paper.. has no brake"),
    pytest.mark.filterwarnings("ignore:.* skipped . steps of channels of conv1.weight by step 25"),
]


def averages(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, Tensor]:
    state = optimizer.state[weight]
    return {name: kept.clone() for name, kept in state.items() if kept.shape == weight.shape}


@pytest.mark.parametrize("family", OPTIMIZERS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nonfinite_gradient_costs_one_step(
    make_net: MakeNet,
    train: Train,
    random_history: MakeHistory,
    make_rule: MakeRule,
    rule_name: str,
    family: str,
    value: float,
) -> None:
    """It would stay in the optimizer's averages for good."""
    if rule_name == "decay" and family != "SGD":
        pytest.skip("DecayEquivalentLR is for SGD only")
    net = make_net()
    make, options = OPTIMIZERS[family]
    optimizer = make(net.parameters(), lr=1e-3, **options)
    handle = make_rule(random_history(net)).attach(optimizer, net.named_parameters())
    train(net, optimizer, 3)
    weight, before = net.conv1.weight, net.conv1.weight.detach().clone()

    def spoil(grad: Tensor) -> Tensor:
        spoiled = grad.clone()
        spoiled[2, 0, 1, 1] = value
        return spoiled

    hook = weight.register_hook(spoil)
    train(net, optimizer, 1, first=3)
    hook.remove()
    torch.testing.assert_close(weight[2].detach(), before[2], rtol=1e-14, atol=0)
    whole = rule_name == "hyperball"  # it undoes the step of a whole weight
    assert torch.equal(weight[1], before[1]) == whole
    kept = averages(optimizer, weight)
    assert kept
    for buffer in kept.values():
        assert bool(buffer.isfinite().all())
        assert rule_name == "decay" or buffer[2, 0, 1, 1] == 0
    others = torch.arange(4) != 2
    assert all(bool((buffer[others] != 0).any()) for buffer in kept.values())
    train(net, optimizer, 40, first=4)
    assert handle.skipped == (4 if whole else 1)
    assert not torch.isclose(weight[2], before[2], rtol=1e-6).all()


def test_decay_resumes_after_a_skipped_step(make_net: MakeNet) -> None:
    """A step that was undone is one that weight decay did not take either, its momentum empty."""
    decayed, equivalent = make_net(), make_net()
    optimizers = [
        torch.optim.SGD([net.conv1.weight], lr=0.05, momentum=0.9, weight_decay=decay)
        for net, decay in ((decayed, 0.02), (equivalent, 0.0))
    ]
    DecayEquivalentLR(0.02).attach(optimizers[1], equivalent.named_parameters())
    for step in range(60):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 2, 8, 8, dtype=torch.float64, generator=generator)
        for net, optimizer in zip((decayed, equivalent), optimizers, strict=True):
            net.zero_grad()
            net(x).logsumexp(1).mean().backward()
            if step != 20:
                optimizer.step()
            elif net is decayed:
                optimizer.state[net.conv1.weight]["momentum_buffer"].zero_()
            else:
                net.conv1.weight.grad.fill_(torch.nan)
                optimizer.step()
    one, other = (net.conv1.weight.detach() for net in (decayed, equivalent))
    one, other = (w / channel_norms(w).view(-1, 1, 1, 1) for w in (one, other))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


def test_skipped_steps_warn_on_remove(
    make_net: MakeNet, random_history: MakeHistory, make_rule: MakeRule
) -> None:
    """A short run ends before the next look."""
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    handle = make_rule(random_history(net)).attach(optimizer, net.named_parameters())
    for _ in range(24):
        net.conv1.weight.grad = torch.full_like(net.conv1.weight, torch.nan)
        optimizer.step()
    with pytest.warns(UserWarning, match="skipped 96 steps of channels of conv1.weight by step 24"):
        handle.remove()
    handle.remove()
