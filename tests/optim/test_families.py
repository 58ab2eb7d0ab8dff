from typing import Any

import equilibrium
import pytest
import torch
from equilibrium import CASES, Case, measure_equilibrium, measure_power
from timm.optim import create_optimizer_v2

from nmlightning import InputError
from nmlightning.optim.families import choose_power, expected_rotation, known_power
from nmlightning.weights.channel_norms import equilibrium_rotation

WEIGHTS = [torch.nn.Parameter(torch.ones(2, 2))]


class Adam8bit(torch.optim.Optimizer):
    """Of a package that is known, by its name and by what its groups hold."""

    __module__ = "torch.optim"

    def __init__(self, weights: Any = WEIGHTS, **options: Any) -> None:
        super().__init__(weights, {"lr": 1e-3, "betas": (0.9, 0.999), **options})


AdamW8bit: Any = type("AdamW8bit", (Adam8bit,), {"__module__": "torch.optim"})
_AdamW: Any = type("_AdamW", (Adam8bit,), {"__module__": "torch.optim"})  # as torchao's


class FusedAdam(Adam8bit):
    __module__ = "torch.optim"
    adam_w_mode = 0

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.adam_w_mode = 1


class Stranger(torch.optim.Optimizer):
    """Of nobody's, by the name alone, which is not this one lest configs find it."""

    def __init__(self) -> None:
        groups = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
        super().__init__(WEIGHTS, groups)


Stranger.__name__ = "AdamW"


class Signs(torch.optim.AdamW):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Would step by signs."""


class Lion(torch.optim.Optimizer):
    """By its paper (Chen et al. 2023), under a known package's name."""

    __module__ = "torch.optim"

    def __init__(self, weights: Any, lr: float = 1e-4, weight_decay: float = 0.0) -> None:
        super().__init__(weights, {"lr": lr, "betas": (0.9, 0.98), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                average = self.state[weight].setdefault("average", torch.zeros_like(weight))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(average.lerp(weight.grad, 1 - beta1).sign(), alpha=group["lr"])
                average.lerp_(weight.grad, 1 - beta2)


OtherSGD: Any = type("OtherSGD", (torch.optim.SGD,), {"step": Signs.step})
Extends: Any = type("Extends", (torch.optim.Adam,), {})  # with the step that it inherits


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "AdamW8bit"])
def test_choose_power_knows_the_family(name: str) -> None:
    make = AdamW8bit if name == "AdamW8bit" else getattr(torch.optim, name)
    assert choose_power(make(WEIGHTS), "auto") == (2 if name == "SGD" else 1)


def test_choose_power_refuses_steps_that_are_proportional_to_the_norm() -> None:
    with pytest.raises(InputError, match="Adafactor are proportional to the weight's norm"):
        choose_power(torch.optim.Adafactor(WEIGHTS), "auto")
    assert choose_power(torch.optim.Adafactor(WEIGHTS), 1) == 1


@pytest.mark.parametrize(
    ("name", "power"),
    [("adafactor", 1), ("nadamw", 1), ("mars", 1), ("novograd", 1), ("sgdw", 2), ("lars", None)],
)
def test_known_power_knows_timms_optimizers(name: str, power: int | None) -> None:
    optimizer = create_optimizer_v2([*WEIGHTS], opt=name, lr=1e-3)  # type: ignore[arg-type]
    assert known_power(optimizer) == power


SIMULATED = [*CASES, Case(__name__, "Lion", 1e-4)]


@pytest.mark.parametrize("case", SIMULATED, ids=str)
def test_families_are_what_a_simulation_finds(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(case.package)
    _, optimizer = equilibrium.start(case, 1.0, case.rate, 1e-4)
    if (known := known_power(optimizer)) is not None:
        # RAdam begins with steps of SGD
        assert measure_power(case) == pytest.approx(known, abs=0.15)
    # An equilibrium takes 1 / ηλ steps, and its formulas leave out terms of the order of ηλ.
    monkeypatch.setattr(equilibrium, "PRODUCT", 1e-3)
    if expected_rotation(optimizer, optimizer.param_groups[0]) is not None:
        found = measure_equilibrium(case, 6000)
        assert found["rotation"] == pytest.approx(found["expected"], rel=0.03)


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
        (torch.optim.SGD(WEIGHTS, 0.1, dampening=0.1, weight_decay=0.01), (0.002) ** 0.5),
        (torch.optim.Adam(WEIGHTS, 0.1, weight_decay=0.01), None),
        (torch.optim.Adam(WEIGHTS, weight_decay=0.1, decoupled_weight_decay=True), 0.0032444),
        (torch.optim.RAdam(WEIGHTS, weight_decay=0.1, decoupled_weight_decay=True), 0.0032444),
        (AdamW8bit(weight_decay=0.1), 0.0032444),
        (_AdamW(weight_decay=0.1), 0.0032444),
        (_AdamW(weight_decay=0.1, caution=True), None),
        (Adam8bit(weight_decay=0.1), None),
        (Adam8bit(weight_decay=0.1, weight_decouple=True), 0.0032444),
        (Adam8bit(weight_decay=0.1, decoupled_decay=True), 0.0032444),
        (Adam8bit(weight_decay=0.1, weight_decouple=True, fixed_decay=True), None),
        (Adam8bit(weight_decay=0.1, decoupled=True, corrected_weight_decay=True), None),
        (FusedAdam(weight_decay=0.1), 0.0032444),
        (Stranger(), None),
        (Signs(WEIGHTS, 1e-3, weight_decay=0.1), None),
        (OtherSGD(WEIGHTS, 0.1, weight_decay=0.01), None),
        (Extends(WEIGHTS, 1e-3, weight_decay=0.1, decoupled_weight_decay=True), 0.0032444),
        (Extends(WEIGHTS, 1e-3, weight_decay=0.1), None),
    ],
)
def test_expected_rotation_takes_the_optimizers_settings(
    optimizer: torch.optim.Optimizer, expected: float | None
) -> None:
    found = expected_rotation(optimizer, optimizer.param_groups[0])
    assert found == (expected if expected is None else pytest.approx(expected, rel=1e-4))

    if type(optimizer) is torch.optim.AdamW:  # it goes by the group
        optimizer.param_groups[0]["decoupled_weight_decay"] = False
        assert expected_rotation(optimizer, optimizer.param_groups[0]) is None
