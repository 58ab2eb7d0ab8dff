"""What is left of a gradient that was not finite, once its step was undone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nmlightning.optim import DecayEquivalentLR
from nmlightning.weights.channel_norms import channel_norms
from nmlightning.weights.history import NormHistory

Train = Callable[..., None]
MakeNet = Callable[[], nn.Module]
MakeHistory = Callable[[nn.Module], NormHistory]
MakeRule = Callable[..., Any]
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
def test_one_gradient_that_is_not_finite_costs_one_step(
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


def test_decay_goes_on_from_an_undone_step(make_net: MakeNet) -> None:
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


def test_what_was_undone_is_told_when_the_rule_is_removed(
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
