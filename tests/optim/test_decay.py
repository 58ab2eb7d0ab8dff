"""The decay rules: which rate counts as the largest, schedules of λ; their ports are elsewhere.

The numpy ports are in test_conditions.py.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentParser
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from lightning_modules import Trains, make_data
from nmlightning.callbacks import WeightNormTracker
from nmlightning.errors import InputError
from nmlightning.optim import CautiousDecay, CorrectedDecay, DecaySchedule, StepRule
from nmlightning.weights.history import NormHistory
from optim_rules import IMPLEMENTATIONS, find_loss, make_net, train
from trainers import SaveAt, quiet_trainer

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, momentum=0.9),
    "AdamW": torch.optim.AdamW,
}


def halve(step: int) -> float:
    return 0.5**step


def decay_of_one_step(rule: Any, *, lr: float = 0.1, schedule: Any = None) -> list[float]:
    """Return by how much a step without a gradient shortens each of a net's three matrices."""
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr)
    rule.attach(optimizer, net)
    if schedule is not None:
        schedule(optimizer)
    train(net, optimizer, 1)  # measures which are scale-invariant
    before = [q.detach().clone() for q in net.parameters() if q.dim() > 1]
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    after = [q.detach() for q in net.parameters() if q.dim() > 1]
    return [float(1 - b.norm() / a.norm()) for a, b in zip(before, after, strict=True)]


@pytest.mark.parametrize(
    ("options", "schedule", "shares"),
    [
        ({}, None, [1.0, 1.0, 1.0]),
        ({"max_lr": 0.4}, None, [0.25, 0.25, 1.0]),
        ({"max_lr": 0.4, "correct": "all"}, None, [0.25] * 3),
        ({}, lambda o: LambdaLR(o, lambda _: 0.2), [0.2, 0.2, 1.0]),  # of initial_lr
        (
            {},
            lambda o: OneCycleLR(o, 0.8, 9, cycle_momentum=False),
            [0.04, 0.04, 1.0],
        ),  # 0.8 / 25 of max_lr
    ],
)
def test_corrected_decay_knows_the_largest_rate(
    options: Any, schedule: Any, shares: list[float]
) -> None:
    lr = {1.0: 0.1, 0.25: 0.1, 0.2: 0.02, 0.04: 0.032}[shares[0]]
    shortened = decay_of_one_step(CorrectedDecay(0.5, **options), schedule=schedule)
    assert shortened == pytest.approx([0.5 * lr * share for share in shares], rel=1e-9)


def test_corrected_decay_remembers_a_larger_rate() -> None:
    """Also where nothing names it, and after a resume."""
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.4)
    rule = CorrectedDecay(0.5, correct="all")
    handle = rule.attach(optimizer, [("weight", weight)])
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    for each in range(2):
        before = weight.detach().clone()
        optimizer.step()
        torch.testing.assert_close(weight.detach(), before * (1 - 0.1 * 0.5 * 0.25))
        if each == 0:
            state = handle.state_dict()
            handle.remove()
            rule.attach(optimizer, [("weight", weight)]).load_state_dict(state)


class DropsGradients(torch.optim.SGD):
    """As those of heavyball."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.zero_grad(set_to_none=True)
        return loss


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, DropsGradients])
@pytest.mark.parametrize("rule", [CorrectedDecay, CautiousDecay])
def test_decay_by_a_schedule(rule: Any, optimizer_class: Any) -> None:
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    optimizer = optimizer_class([weight], lr=0.1)
    rule(halve).attach(optimizer, [("weight", weight)])
    optimizer.step()  # without a gradient there is neither step nor decay, and none is counted
    assert bool((weight == 1).all())
    expected = 1.0
    for step in range(1, 4):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        expected *= 1 - 0.1 * 0.5**step
        torch.testing.assert_close(weight.detach(), torch.full_like(weight, expected))
    kinds = [rule(each).attach(torch.optim.SGD([weight]), [("w", weight)]) for each in (halve, 0.5)]
    for one, other in permutations(kinds):
        with pytest.raises(InputError, match=r"with weight_decay=\S+.*, and this run is with wei"):
            one.load_state_dict(other.state_dict())


@pytest.mark.parametrize("attaches_first", [True, False])
@pytest.mark.parametrize("scale", [lambda t: max(0, 1 - t / 2), lambda t: float(t > 4)])
def test_decay_schedule_resumes_where_it_is_zero(scale: Any, attaches_first: bool) -> None:
    nets, rule = [make_net(), make_net()], DecaySchedule(scale)
    whole, first, optimizer = (
        torch.optim.AdamW(nets[i].parameters(), weight_decay=0.3) for i in (0, 1, 1)
    )
    rule.attach(whole, nets[0])
    train(nets[0], whole, 7)
    handle = rule.attach(first, nets[1])
    train(nets[1], first, 3)
    state, kept = handle.state_dict(), first.state_dict()
    for attaches in (attaches_first, not attaches_first):
        if attaches:
            handle = rule.attach(optimizer, nets[1])
        else:
            optimizer.load_state_dict(kept)
    handle.load_state_dict(state)
    train(nets[1], optimizer, 4, first=3)
    torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict(), rtol=0, atol=0)
    handle.remove()
    group = optimizer.param_groups[0]
    assert (group["weight_decay"], "initial_weight_decay" in group) == (0.3, False)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", OPTIMIZERS)
@pytest.mark.parametrize("skips", [False, True])
def test_decay_schedule_is_an_optimizer_of_changing_decay(
    family: str, implementation: str, skips: bool
) -> None:
    """By hand λ is set before each step; a step that AMP skips does not count."""
    nets = make_net(), make_net()
    make = partial(OPTIMIZERS[family], lr=0.01, weight_decay=0.3, **IMPLEMENTATIONS[implementation])
    optimizers = [make(net.parameters()) for net in nets]
    DecaySchedule(halve).attach(optimizers[0], nets[0])
    scaler = torch.amp.GradScaler("cpu", enabled=skips)
    taken = 0
    for step in range(6):
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            find_loss(net, 2 * step).backward()
            find_loss(net, 2 * step + 1).backward()
            if not skips or step % 2:
                optimizer.param_groups[0]["weight_decay"] = 0.3 * 0.5**taken
        scaler.scale(torch.zeros((), requires_grad=True)).backward()
        if skips:
            for q in nets[0].parameters():
                q.grad *= scaler.get_scale()
            if step % 2 == 0:
                nets[0].head.weight.grad[0, 0] = torch.inf
        scaler.step(optimizers[0])
        scaler.update()
        if not skips or step % 2:
            optimizers[1].step()
            taken += 1
            assert optimizers[0].param_groups[0]["weight_decay"] == 0.3 * 0.5 ** (taken - 1)
    torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict(), rtol=1e-12, atol=1e-12)


def test_decay_schedule_leaves_the_groups_of_others() -> None:
    net = make_net()
    groups = [{"params": [q], "weight_decay": 0.1 * (q.dim() > 2)} for q in net.parameters()]
    optimizer = torch.optim.AdamW(groups)
    handle = DecaySchedule(lambda _: 2.0, exclude=["conv2.*"]).attach(optimizer, net)
    train(net, optimizer, 2)
    decays = [0.2, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0, 0.0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx(decays)
    assert handle.steered == ["conv1.weight", "head.weight"]


def test_tracker_of_a_schedule_is_found_again_in_a_checkpoint() -> None:
    key = WeightNormTracker(steering=DecaySchedule(halve)).state_key
    assert "0x" not in key
    assert "'schedule': 'halve'" in key


class Decays(Trains, pl.LightningModule):
    """Notes the decay of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.adam = torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.3)
        return self.adam

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(self.adam.param_groups[0]["weight_decay"])


def test_tracker_schedules_the_decay_and_resumes(tmp_path: Path) -> None:
    def fit(epochs: int, start: Path | None = None) -> Decays:
        module, tracker = Decays(), WeightNormTracker(1, DecaySchedule(halve))
        trainer = quiet_trainer(
            tracker,
            SaveAt(4, tmp_path / "4.ckpt", "on_train_epoch_end"),
            max_epochs=epochs,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, make_data(), ckpt_path=start)
        assert module.adam.param_groups[0]["weight_decay"] == 0.3
        return module

    whole = fit(2).seen
    assert whole == pytest.approx([0.3 * 0.5**step for step in range(len(whole))])
    assert NormHistory.load(tmp_path).weight_decays[-1, 0] == pytest.approx(whole[-1])
    rest = fit(2, tmp_path / "4.ckpt").seen
    assert rest == whole[4:]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("UnitNorm", {"dim": {"*.out.weight": 0, "*": 1}, "norm": "rms"}),
        ("DecaySchedule", {"schedule": "math.exp"}),
        ("CorrectedDecay", {"weight_decay": 0.1, "correct": "all"}),
        ("CautiousDecay", {"weight_decay": "math.exp"}),
        ("SpectralCap", {"sigma_max": 2.0}),
        ("Hyperball", {"granularity": "matrix"}),
    ],
)
def test_rules_are_made_by_configs(name: str, options: dict[str, Any]) -> None:
    parser = ArgumentParser()
    parser.add_argument("--rule", type=StepRule)
    given = {"class_path": f"nmlightning.{name}", "init_args": options}
    rule = parser.instantiate(parser.parse_object({"rule": given})).rule
    assert type(rule).__name__ == name
    named = {"math.exp": math.exp}
    for key, value in options.items():
        assert getattr(rule, key) == (named.get(value, value) if key != "dim" else value)
