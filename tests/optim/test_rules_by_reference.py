"""LRCorrection and NormSchedule by their definitions, against the run that they follow.

The numpy port of their modes is in test_conditions.py.
"""

import numpy as np
import pytest
import torch
from torch import nn

from nmlightning.optim.lr_correction import LRCorrection
from nmlightning.optim.norm_schedule import NormSchedule
from nmlightning.weights.channel_norms import channel_norms
from nmlightning.weights.history import NormHistory
from optim_rules import (
    CONVOLUTIONS,
    NormRows,
    direction_distance,
    make_net,
    random_history,
    split_groups,
    train,
)


def sgd(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(split_groups(net, 0.0, 5e-4), lr=0.02, momentum=0.9)


def test_corrected_run_follows_decayed_run() -> None:
    """With a record at each step and no momentum the directions agree as far as the rule can."""
    decayed, corrected, free = make_net(), make_net(), make_net()
    rows = NormRows(decayed)
    train(decayed, torch.optim.SGD(split_groups(decayed, 1.0), lr=0.01), 100, each=rows.record)
    optimizer = torch.optim.SGD(corrected.parameters(), lr=0.01)
    correction = LRCorrection(rows.history(), align="interpolate", max_rotation=None)
    correction.attach(optimizer, corrected.named_parameters())
    train(corrected, optimizer, 100)
    train(free, torch.optim.SGD(free.parameters(), lr=0.01), 100)
    far = direction_distance(free, decayed)
    assert direction_distance(corrected, decayed) < 0.02 * far
    for name, values in rows.history().norms.items():
        found = channel_norms(corrected.get_parameter(name)).float()
        torch.testing.assert_close(found, torch.from_numpy(values[0]))


@pytest.mark.filterwarnings("ignore:LRCorrection.mode=.paper.. lets weights")
def test_paper_mode_diverges_and_stable_mode_does_not() -> None:
    """Norms that only ever shrink, as of channels that weight decay kills."""
    for mode, stays in (("paper", False), ("stable", True)):
        net = make_net()
        initial = {n: channel_norms(net.get_parameter(n)) for n in CONVOLUTIONS}
        decay = torch.logspace(-1, -4, 10)[:, None]
        history = NormHistory.from_arrays(
            {name: (norms * decay).numpy() for name, norms in initial.items()},
            range(10, 101, 10),
            range(10),
        )
        optimizer = sgd(net)
        LRCorrection(history, mode=mode).attach(optimizer, net.named_parameters())
        train(net, optimizer, 100)
        growth = max(
            (channel_norms(net.get_parameter(name)) / norms).max().item()
            for name, norms in initial.items()
        )
        # 1e19 is where float32 can no longer form the square of a norm.
        assert growth == pytest.approx(1.0) if stays else growth > 1e19


@pytest.mark.parametrize("rule", [LRCorrection, NormSchedule])
def test_momentum_along_the_weight_dies_out(rule: type[LRCorrection | NormSchedule]) -> None:
    """Lengthened by it and scaled back, a weight multiplied it by up to 1.2 · 0.9 a step."""
    net = make_net()
    weight, optimizer = net.conv1.weight, sgd(net)
    rule(random_history(net), power=2).attach(optimizer, net.named_parameters())
    train(net, optimizer, 3)
    momentum = optimizer.state[weight]["momentum_buffer"]
    momentum[0] = -100 * weight.detach()[0]
    train(net, optimizer, 90, first=3)
    along = (momentum[0] * weight.detach()[0]).sum() / weight.detach()[0].norm()
    assert along.abs() < 1  # 0.9 · 1.02 to the power of 90 is 0.0004


@pytest.mark.parametrize(("family", "power"), [("SGD", 2), ("Adam", 1)])
@pytest.mark.parametrize("rate", [0.1, 0.02, 0.0])
def test_norm_schedule_gives_the_defined_norms(family: str, power: int, rate: float) -> None:
    net = make_net()
    history = random_history(net)
    optimizer = getattr(torch.optim, family)(net.parameters(), lr=0.1)
    NormSchedule(history).attach(optimizer, net.named_parameters())
    train(net, optimizer, 1)
    before = net.conv1.weight.detach().clone()
    optimizer.param_groups[0]["lr"] = rate
    train(net, optimizer, 1, first=1)
    if rate == 0:
        torch.testing.assert_close(net.conv1.weight.detach(), before, rtol=0, atol=0)
        return
    norms = torch.from_numpy(history.norms["conv1.weight"][0]) * (0.1 / rate) ** (1 / power)
    torch.testing.assert_close(channel_norms(net.conv1.weight).float(), norms)


@pytest.mark.filterwarnings("ignore:NormSchedule skipped .* steps of channels of")
@pytest.mark.parametrize("max_rotation", [0.2, None])
def test_schedule_of_vanishing_norms_stays_finite(max_rotation: float | None) -> None:
    net = make_net()
    history = random_history(net)
    for values in history.norms.values():
        values *= np.logspace(0, -4, 10)[:, None]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    schedule = NormSchedule(history, max_rotation=max_rotation)
    handle = schedule.attach(optimizer, net.named_parameters())
    train(net, optimizer, 99)
    assert (handle.skipped == 0) is (max_rotation is not None)
    assert all(bool(net.get_parameter(name).isfinite().all()) for name in CONVOLUTIONS)
