"""NormSchedule by its definition, and against the learning-rate schedule that it replaces."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nmlightning.errors import InputError
from nmlightning.optim.norm_schedule import NormSchedule
from nmlightning.weights.channel_norms import channel_norms
from nmlightning.weights.history import NormHistory

Train = Callable[..., None]
MakeNet = Callable[[], nn.Module]
MakeHistory = Callable[[nn.Module], NormHistory]
CONVOLUTIONS = ("conv1.weight", "conv2.weight")


@pytest.mark.parametrize(("family", "power"), [("SGD", 2), ("Adam", 1)])
@pytest.mark.parametrize("rate", [0.1, 0.02, 0.0])
def test_definition(
    make_net: MakeNet,
    train: Train,
    random_history: MakeHistory,
    family: str,
    power: int,
    rate: float,
) -> None:
    net = make_net()
    history = random_history(net)
    optimizer = getattr(torch.optim, family)(net.parameters(), lr=0.1)
    NormSchedule(history).attach(optimizer, net.named_parameters())
    train(net, optimizer, 1)
    plain: dict[str, Tensor] = {}
    before = net.conv1.weight.detach().clone()
    optimizer.param_groups[0]["lr"] = rate
    first = optimizer.register_step_post_hook(
        lambda *_: plain.update(steered=net.conv1.weight.detach().clone())
    )
    train(net, optimizer, 1, first=1)
    first.remove()
    if rate == 0:
        torch.testing.assert_close(net.conv1.weight.detach(), before, rtol=0, atol=0)
        return
    expected_norms = torch.from_numpy(history.norms["conv1.weight"][0]) * (0.1 / rate) ** (
        1 / power
    )
    torch.testing.assert_close(channel_norms(net.conv1.weight).float(), expected_norms)


def test_norm_schedule_replaces_lr_schedule(make_net: MakeNet, train: Train) -> None:
    """A run with decay and a scheduler, recorded at each step, against norms under one rate."""
    decayed, scheduled, free = make_net(), make_net(), make_net()
    steps = 100
    rows: dict[str, list[Tensor]] = {name: [] for name in CONVOLUTIONS}

    def record(_: int = 0) -> None:
        for name, values in rows.items():
            values.append(channel_norms(decayed.get_parameter(name)).float())

    def make_optimizer(net: nn.Module, decay: float) -> tuple[torch.optim.Optimizer, Any]:
        steered = [net.get_parameter(name) for name in CONVOLUTIONS]
        rest = [q for name, q in net.named_parameters() if name not in CONVOLUTIONS]
        optimizer = torch.optim.SGD(
            [{"params": steered, "weight_decay": decay}, {"params": rest}], lr=0.01
        )
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 40, 0.3)

    record()
    optimizer, scheduler = make_optimizer(decayed, 3.0)

    def record_and_step(_: int) -> None:
        record()
        scheduler.step()

    train(decayed, optimizer, steps, each=record_and_step)
    arrays = {name: torch.stack(values).numpy() for name, values in rows.items()}
    history = NormHistory.from_arrays(arrays, range(steps + 1), [0] * (steps + 1))
    for net in (scheduled, free):
        own, own_scheduler = make_optimizer(net, 0.0)
        if net is scheduled:
            schedule = NormSchedule(history, align="interpolate")
            handle = schedule.attach(own, net.named_parameters())
            # After a step the norms are those recorded after it.
            handle.clock = lambda handle=handle: {"step": handle.steps}
        train(net, own, steps, each=lambda _, s=own_scheduler: s.step())

    def distance(net: nn.Module) -> float:
        pairs = [(net.get_parameter(n), decayed.get_parameter(n)) for n in CONVOLUTIONS]
        cosines = [torch.cosine_similarity(a.flatten(1), b.flatten(1)).min() for a, b in pairs]
        return 1 - min(cosine.item() for cosine in cosines)

    # The norm follows a change of the rate one step late.
    assert distance(scheduled) < 0.1 * distance(free)
    for name in CONVOLUTIONS:
        growth = channel_norms(scheduled.get_parameter(name)) / channel_norms(
            decayed.get_parameter(name)
        )
        torch.testing.assert_close(growth, torch.full_like(growth, 1 / 0.3))  # √(1 / 0.3²)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_bad_base_lr_is_refused(rate: float) -> None:
    with pytest.raises(InputError, match=f"base_lr is a positive number, or None, got {rate}"):
        NormSchedule("somewhere", rate)


@pytest.mark.filterwarnings("ignore:NormSchedule skipped .* steps of channels of")
@pytest.mark.parametrize("max_rotation", [0.2, None])
def test_schedule_of_vanishing_norms(
    make_net: MakeNet, train: Train, random_history: MakeHistory, max_rotation: float | None
) -> None:
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


@pytest.mark.parametrize("bound", [0.0, -1.0])
def test_bad_max_rotation_is_refused(bound: float) -> None:
    with pytest.raises(
        InputError, match=f"max_rotation is a positive number, or None, got {bound}"
    ):
        NormSchedule("somewhere", max_rotation=bound)
