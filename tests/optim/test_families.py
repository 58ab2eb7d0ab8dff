import pytest
import torch

from nmlightning.optim.families import choose_power, expected_rotation
from nmlightning.weights.channel_norms import equilibrium_rotation

WEIGHTS = [torch.nn.Parameter(torch.ones(2, 2))]


@pytest.mark.parametrize(
    ("optimizer", "power"),
    [("SGD", 2), ("Adam", 1), ("AdamW", 1), ("NAdam", 1), ("RAdam", 1), ("RMSprop", 1)],
)
def test_choose_power_knows_the_family(optimizer: str, power: int) -> None:
    assert choose_power(getattr(torch.optim, optimizer)(WEIGHTS, lr=0.1), "auto") == power


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (torch.optim.SGD(WEIGHTS, 0.1, weight_decay=0.01), equilibrium_rotation(0.1, 0.01)),
        (
            torch.optim.SGD(WEIGHTS, 0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
            equilibrium_rotation(0.1, 0.01, momentum=0.9, nesterov=True),
        ),
        (
            torch.optim.AdamW(WEIGHTS, 0.1, betas=(0.8, 0.99), weight_decay=0.01),
            equilibrium_rotation(0.1, 0.01, beta1=0.8),
        ),
        (torch.optim.SGD(WEIGHTS, 0.1), None),
        (torch.optim.SGD(WEIGHTS, 0.1, momentum=0.9, dampening=0.1, weight_decay=0.01), None),
        (torch.optim.Adam(WEIGHTS, 0.1, weight_decay=0.01), None),
    ],
    ids=["sgd", "nesterov", "adamw", "no decay", "dampening", "adam"],
)
def test_expected_rotation_takes_the_optimizers_settings(
    optimizer: torch.optim.Optimizer, expected: float | None
) -> None:
    assert expected_rotation(optimizer, optimizer.param_groups[0]) == expected
