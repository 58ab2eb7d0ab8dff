"""InverseSquareRootLR: the formula, the paper's own form of it, and a resume."""

from typing import Any

import pytest
import torch

from nmlightning.errors import InputError
from nmlightning.optim.schedules import InverseSquareRootLR


def rates(steps: int, warmup: int, lr: float = 1.0) -> list[float]:
    optimizer = torch.optim.Adam([torch.zeros(1)], lr=lr)
    schedule = InverseSquareRootLR(optimizer, warmup)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_schedule_is_the_formula_of_the_paper() -> None:
    width, warmup = 512, 40
    paper = [width**-0.5 * min(t**-0.5, t * warmup**-1.5) for t in range(1, 201)]
    assert rates(200, warmup, lr=(width * warmup) ** -0.5) == pytest.approx(paper)


def test_schedule_scales_each_groups_rate() -> None:
    groups = [{"params": [torch.zeros(1)], "lr": lr} for lr in (1.0, 0.1)]
    schedule = InverseSquareRootLR(torch.optim.SGD(groups, lr=1.0), 10)
    assert schedule.get_last_lr() == pytest.approx([0.1, 0.01])


def test_schedule_resumes() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = InverseSquareRootLR(optimizer, 4)
    for _ in range(6):
        optimizer.step()
        schedule.step()
    other = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    resumed = InverseSquareRootLR(other, 4)
    resumed.load_state_dict(schedule.state_dict())
    other.load_state_dict(optimizer.state_dict())
    other.step()
    resumed.step()
    assert other.param_groups[0]["lr"] == pytest.approx((4 / 8) ** 0.5)


@pytest.mark.parametrize("warmup", [0, -1, 2.5, "many"])
def test_schedule_refuses_no_warm_up(warmup: Any) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    with pytest.raises(InputError, match="warmup_steps must be a whole number of at least 1"):
        InverseSquareRootLR(optimizer, warmup)
