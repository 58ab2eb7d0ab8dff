"""Every rule under norms, steps and gradients that are not finite, also where one rank has them.

Run as a script it is one of two ranks: `python test_nonfinite_steps.py FOLDER RANK`.
"""

import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor

from nmlightning.errors import InputError
from nmlightning.optim import DecayEquivalentLR
from nmlightning.optim.nonfinite_steps import MAX_SKIPPED_STEPS
from nmlightning.weights.channel_norms import channel_norms
from nmlightning.weights.history import NormHistory
from optim_rules import (
    ANY_MATRIX,
    REFERENCED,
    RULES,
    WHOLE,
    MakeRule,
    attach,
    make_net,
    random_history,
    sgd,
    train,
)
from scripts import run_ranks

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.0, "amsgrad": True}),
    "RMSprop": (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:LRCorrection.mode=.paper.. lets weights"),
    pytest.mark.filterwarnings("ignore:.* skipped . steps of channels of conv1.weight by step 25"),
]


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
def test_dead_channels_are_not_steered(make_rule: MakeRule, dead: float) -> None:
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


@pytest.mark.filterwarnings("ignore:.* skipped .* steps of channels of")
def test_nonfinite_gradients_warn_and_stop_the_run(make_rule: MakeRule, rule_name: str) -> None:
    net, optimizer, handle = attach(make_rule)
    handle.clock = lambda: {"epoch": 0}
    train(net, optimizer, 1)
    spoil(net, channel=2)
    channels = 4 if rule_name in WHOLE else 1
    skipped = f"skipped {24 * channels} steps of channels of conv1.weight"
    with pytest.warns(UserWarning, match=f"{skipped} by step 25, since they, their gradients"):
        step_on(optimizer, 24)
    step_on(optimizer, 99)
    message = (
        "had to skip the steps of conv1.weight 124 times in a row "
        f"(now of {channels} channels): their gradients are not finite. Find the operation that "
        "makes them so"
    )
    assert 100 <= MAX_SKIPPED_STEPS <= 124  # it checks at every 25th
    with pytest.raises(InputError, match=re.escape(message)):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:.* skipped .* steps of channels of")
@pytest.mark.parametrize("rule_name", ["stable", "paper", "layer"])
def test_nonfinite_factors_skip_steps_and_stop_the_run(make_rule: MakeRule) -> None:
    """A recorded norm so small that nothing in float32 can be divided by it."""
    net = make_net().float()
    history = random_history(net)
    history.norms["conv1.weight"][:] = 1e-44
    optimizer = sgd(net)
    handle = make_rule(history).attach(optimizer, net.named_parameters())
    handle.clock = lambda: {"epoch": 0}
    before = net.conv1.weight.detach().clone()
    for name, q in net.named_parameters():
        q.grad = across(q) if name.startswith("conv") else torch.zeros_like(q)
    optimizer.step()
    assert handle.skipped == len(before)
    torch.testing.assert_close(net.conv1.weight.detach(), before)
    with pytest.raises(InputError, match="steps or factors are not finite, so the run has diverg"):
        step_on(optimizer, 125)


def attach_to_one(
    make_rule: MakeRule, weight: nn.Parameter, norms: Tensor, lr: float
) -> tuple[torch.optim.SGD, Any]:
    """Return a weight's SGD under a rule that follows one record of its norms."""
    history = NormHistory.from_arrays({"c": norms[None].numpy()}, [10], [0])
    optimizer = torch.optim.SGD([weight], lr=lr)
    return optimizer, make_rule(history, include=["c"]).attach(optimizer, [("c", weight)])


@pytest.mark.parametrize(
    ("dtype", "shrink", "gradient"),
    [
        # A factor of 1e36, which float32 holds, on steps of a thousand, whose product it does not.
        (torch.float32, 1e-18, 1e6),
        # A factor of 1e6, which half precision holds no more than its product with a step of one.
        (torch.float16, 1e-3, 1e3),
    ],
)
def test_step_out_of_range_is_skipped(dtype: torch.dtype, shrink: float, gradient: float) -> None:
    weight = nn.Parameter(torch.randn(4, 3, 3, 3).to(dtype))
    before = weight.detach().clone()
    norms = channel_norms(weight) * shrink
    optimizer, handle = attach_to_one(RULES["paper"], weight, norms, lr=1e-3)
    weight.grad = across(weight) * gradient
    optimizer.step()
    assert handle.skipped == 4
    assert torch.equal(weight, before)


def test_factor_beyond_half_is_applied_to_a_small_step() -> None:
    """Its product with a small step is an ordinary number."""
    weight = nn.Parameter(torch.randn(4, 3, 3, 3).half())
    with torch.no_grad():
        weight[:, 0, 0, 0] = 0.0  # next to which half precision has small numbers
    norms = channel_norms(weight) * 1e-3
    optimizer, handle = attach_to_one(RULES["paper"], weight, norms, lr=0.125)
    weight.grad = torch.zeros_like(weight)
    weight.grad[:, 0, 0, 0] = 2.0**-17
    optimizer.step()
    assert handle.skipped == 0
    moved = weight[:, 0, 0, 0].detach().float()
    torch.testing.assert_close(moved, torch.full((4,), -1e6 * 2.0**-20), rtol=1e-3, atol=0)


def test_recorded_norm_beyond_half_leaves_the_weight() -> None:
    weight = nn.Parameter(torch.randn(4, 1, 1, 1).half())
    before = weight.detach().clone()
    optimizer, _ = attach_to_one(RULES["schedule"], weight, torch.full((4,), 1e6), lr=0.1)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, before)


def averages(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, Tensor]:
    state = optimizer.state[weight]
    return {name: kept.clone() for name, kept in state.items() if kept.shape == weight.shape}


@pytest.mark.parametrize("family", OPTIMIZERS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nonfinite_gradient_skips_one_step(
    make_rule: MakeRule, rule_name: str, family: str, value: float
) -> None:
    """It does not stay in the optimizer's averages."""
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
    whole = rule_name in WHOLE
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


def test_remove_warns_of_skipped_steps(make_rule: MakeRule) -> None:
    """A short run ends before the next check."""
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    handle = make_rule(random_history(net)).attach(optimizer, net.named_parameters())
    for _ in range(24):
        net.conv1.weight.grad = torch.full_like(net.conv1.weight, torch.nan)
        optimizer.step()
    with pytest.warns(UserWarning, match="skipped 96 steps of channels of conv1.weight by step 24"):
        handle.remove()
    handle.remove()


# DecayEquivalentLR would change the weights of the rank alone that has their momentum.
ZERO_RULES = sorted(RULES.keys() - {"decay"})


def step_until_it_stops(rank: int) -> dict[str, Any]:
    """Return one rank's report; the gradients of rank 1 are NaN from the third step on."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), nn.Conv2d(6, 4, 3, bias=False))
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, foreach=False)
    handle = DecayEquivalentLR(0.01, exclude=["1.*"]).attach(optimizer, net.named_parameters())
    counts, state = [], {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for step in range(200):
                for q in net.parameters():
                    q.grad = torch.zeros_like(q)
                    if rank == 1 and step >= 2:
                        assert isinstance(q.grad, DTensor)
                        q.grad.to_local().fill_(torch.nan)
                optimizer.step()
                counts.append(handle.skipped)
                if step == 30:
                    state = handle.state_dict()
        except InputError as error:
            message = str(error)
    resumed = DecayEquivalentLR(0.01, exclude=["1.*"]).attach(
        torch.optim.SGD(net.parameters(), lr=0.01), net.named_parameters()
    )
    resumed.load_state_dict(state)
    return {
        "initial": state["weights"]["0.weight"]["initial"].tolist(),
        "initial here": resumed.state_dict()["weights"]["0.weight"]["initial"].tolist(),
        "message": message,
        "steps": handle.steps,
        "counts": counts,
        "warnings": [str(each.message) for each in caught if "skipped" in str(each.message)],
        "resumed": resumed.skipped,
    }


def compare_with_zero() -> dict[str, float]:
    """Return how far ZeroRedundancyOptimizer, whose ranks share the state, is from its SGD."""
    errors = {}
    for name in ZERO_RULES:
        nets = [make_net(), make_net()]
        options = {"lr": 0.02, "momentum": 0.9}
        optimizers = (
            torch.optim.SGD(nets[0].parameters(), **options),
            ZeroRedundancyOptimizer(nets[1].parameters(), torch.optim.SGD, **options),
        )
        for net, optimizer in zip(nets, optimizers, strict=True):
            RULES[name](random_history(net)).attach(optimizer, net)
            train(net, optimizer, 6)
        parameters = zip(*(net.parameters() for net in nets), strict=True)
        errors[name] = max(float((one - other).abs().max()) for one, other in parameters)
    return errors


def make_matrices() -> nn.Module:
    """Return a net with a stack of four experts, of which nobody takes an output."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    net.register_parameter("experts", nn.Parameter(torch.randn(4, 3, 5)))
    return net.double()


def step_by_number(net: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    """Step by the same gradients on any number of ranks."""
    for number in numbers:
        for q in net.parameters():
            grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(number)).to(q.dtype)
            sharded = isinstance(q, DTensor)
            q.grad = distribute_tensor(grad, q.device_mesh, q.placements) if sharded else grad
        optimizer.step()


def save_in_between(name: str, file: Path, rank: int) -> None:
    """Train sharded weights under a rule, and save what it was after four of seven steps."""
    net = make_matrices()
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, foreach=False)
    handle = RULES[name](None).attach(optimizer, net.named_parameters())
    kept: list[Any] = []
    for numbers in (range(4), range(4, 7)):
        step_by_number(net, optimizer, numbers)
        kept += [{n: q.full_tensor().detach() for n, q in net.named_parameters()}]
        kept += [handle.state_dict()]
    if rank == 0:
        torch.save(kept, file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.mark.parametrize("rule_name", ANY_MATRIX)
def test_resume_on_another_number_of_ranks(
    reports: list[dict[str, Any]], folder: Path, rule_name: str
) -> None:
    """From two to one: each expert has its own radius, singular vector or rows."""
    assert reports
    first, state, last, end = torch.load(folder / f"{rule_name}.pt", weights_only=True)
    net = make_matrices()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    handle = RULES[rule_name](None).attach(optimizer, net.named_parameters())
    step_by_number(net, optimizer, range(4))
    torch.testing.assert_close(dict(net.named_parameters()), first)
    handle.load_state_dict(state)
    step_by_number(net, optimizer, range(4, 7))
    torch.testing.assert_close(dict(net.named_parameters()), last)
    torch.testing.assert_close(handle.state_dict()["weights"], end["weights"])


@pytest.fixture(scope="module")
def reports(folder: Path) -> list[dict[str, Any]]:
    """Return the report of each of two ranks."""
    run_ranks(2, __file__, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_ranks_stop_together(reports: list[dict[str, Any]]) -> None:
    assert reports[0] == reports[1]
    assert 100 <= MAX_SKIPPED_STEPS <= 123  # it checks at every 25th
    assert reports[0]["steps"] == 125
    assert reports[0]["message"].startswith(
        "DecayEquivalentLR had to skip the steps of 0.weight 123 times in a row (now of 3 "
        "channels): their gradients are not finite."
    )


def test_resume_keeps_channels_of_both_ranks(reports: list[dict[str, Any]]) -> None:
    """One of the ranks writes the checkpoint, and both read it."""
    torch.manual_seed(0)
    norms = channel_norms(nn.Conv2d(2, 6, 3, bias=False).weight)
    for rank in reports:
        torch.testing.assert_close(torch.tensor(rank["initial"]), norms)
        assert rank["initial here"] == rank["initial"]


def test_rules_on_a_zero_redundancy_optimizer(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert report["zero"] == pytest.approx(dict.fromkeys(ZERO_RULES, 0.0), abs=1e-12)


def test_ranks_count_together(reports: list[dict[str, Any]]) -> None:
    assert reports[0]["counts"] == [3 * max(0, step - 1) for step in range(124)]
    assert reports[0]["resumed"] == 3 * 29
    assert len(reports[0]["warnings"]) == 4
    assert "skipped 69 steps of channels of 0.weight by step 25" in reports[0]["warnings"][0]


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for name in ANY_MATRIX:
        save_in_between(name, folder / f"{name}.pt", rank)
    report = {**step_until_it_stops(rank), "zero": compare_with_zero()}
    (folder / f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()
