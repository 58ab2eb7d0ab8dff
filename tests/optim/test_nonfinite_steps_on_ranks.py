"""Test that two ranks, of which one finds what is not finite, warn and stop together.

Run as a script it is one of the ranks: `python test_nonfinite_steps_on_ranks.py FOLDER RANK`.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

import optim_rules
from nmlightning.errors import InputError
from nmlightning.optim import DecayEquivalentLR
from nmlightning.optim.nonfinite_steps import MAX_SKIPPED_STEPS
from nmlightning.weights.channel_norms import channel_norms
from scripts import run_ranks

# DecayEquivalentLR would change the weights of the rank alone that has their momentum.
ZERO_RULES = sorted(optim_rules.RULES.keys() - {"decay"})


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
        nets = [optim_rules.make_net(), optim_rules.make_net()]
        options = {"lr": 0.02, "momentum": 0.9}
        optimizers = (
            torch.optim.SGD(nets[0].parameters(), **options),
            ZeroRedundancyOptimizer(nets[1].parameters(), torch.optim.SGD, **options),
        )
        for net, optimizer in zip(nets, optimizers, strict=True):
            optim_rules.RULES[name](optim_rules.random_history(net)).attach(optimizer, net)
            optim_rules.train(net, optimizer, 6)
        parameters = zip(*(net.parameters() for net in nets), strict=True)
        errors[name] = max(float((one - other).abs().max()) for one, other in parameters)
    return errors


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the report of each of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
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
    report = {**step_until_it_stops(rank), "zero": compare_with_zero()}
    (folder / f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()
