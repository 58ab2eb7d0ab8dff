"""NormSchedule by its definition, and against the learning-rate schedule that it replaces."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nmlightning.optim.norm_schedule import NormSchedule
from nmlightning.weights.channel_norms import channel_norms
from optim_rules import (
    CONVOLUTIONS,
    NormRows,
    direction_distance,
    make_net,
    random_history,
    split_groups,
    train,
)


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


def test_norm_schedule_replaces_lr_schedule() -> None:
    """A run with decay and a scheduler, recorded at each step, against norms under one rate."""
    decayed, scheduled, free = make_net(), make_net(), make_net()
    rows = NormRows(decayed)

    def make_optimizer(net: nn.Module, decay: float) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD(split_groups(net, decay), lr=0.01)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 40, 0.3)

    optimizer, scheduler = make_optimizer(decayed, 3.0)

    def record_and_step(_: int) -> None:
        rows.record()
        scheduler.step()

    train(decayed, optimizer, 100, each=record_and_step)
    for net in (scheduled, free):
        own, own_scheduler = make_optimizer(net, 0.0)
        if net is scheduled:
            schedule = NormSchedule(rows.history(), align="interpolate")
            handle = schedule.attach(own, net.named_parameters())
            # After a step the norms are those recorded after it.
            handle.clock = lambda handle=handle: {"step": handle.steps}
        train(net, own, 100, each=lambda _, s=own_scheduler: s.step())
    # The norm follows a change of the rate one step late.
    assert direction_distance(scheduled, decayed) < 0.1 * direction_distance(free, decayed)
    for name in CONVOLUTIONS:
        growth = channel_norms(scheduled.get_parameter(name)) / channel_norms(
            decayed.get_parameter(name)
        )
        torch.testing.assert_close(growth, torch.full_like(growth, 1 / 0.3))  # √(1 / 0.3²)


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
