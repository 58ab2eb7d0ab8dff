"""Two processes in int8 equal one on their batches concatenated, where they share ranges.

Run as a script, this file is one rank of those that the tests compare with a single process.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nmlightning.int8 import Int8Conv2d
from nmlightning.int8.quantizer import extreme
from nmlightning.kernels import norm_backend
from scripts import run_ranks

SHARES = (5, 2)


def train(rank: int | None, **settings: Any) -> dict[str, Any]:
    """Return what a layer computes of a rank's samples, or of all."""
    torch.manual_seed(1)
    layer = Int8Conv2d(4, 6, 3, gradient_bits=3, sync=True, **settings)
    x, grad = torch.randn(7, 4, 6, 6), torch.randn(7, 6, 4, 4)
    if rank is not None:
        x, grad = (whole.split(SHARES)[rank] for whole in (x, grad))
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad)
    parameters = {name: q.grad for name, q in layer.named_parameters()}
    return {
        "y": y.detach(),
        "x": x.grad,
        "parameters": parameters,
        "state": dict(layer.named_buffers()),
    }


def answer(rank: int) -> dict[str, Any]:
    """Return what one rank gets."""
    torch.manual_seed(2)
    layer, x = Int8Conv2d(4, 6, 3, gradient_bits=2), torch.randn(2, 4, 6, 6).requires_grad_()
    results = {"synced": train(rank, rounding="nearest")}
    torch.manual_seed(3)
    layer(x).pow(2).sum().backward()
    results["drawn"] = x.grad
    poisoned = torch.tensor([1.0, torch.nan if rank == 0 else 2.0])
    results["poisoned"] = extreme(poisoned, dist.group.WORLD)
    return results


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(2, __file__, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_ranks_equal_one_process(answers: list[dict[str, Any]]) -> None:
    with norm_backend("auto"):
        alone = train(None, rounding="nearest")
    ranks = [answer["synced"] for answer in answers]
    # The mean of the ranges is summed in another order: the scale may differ in its last bit.
    for key in ("y", "x"):
        torch.testing.assert_close(torch.cat([rank[key] for rank in ranks]), alone[key])
    for name, expected in alone["parameters"].items():
        torch.testing.assert_close(sum(rank["parameters"][name] for rank in ranks), expected)
    for rank in ranks:
        torch.testing.assert_close(rank["state"], alone["state"])
        torch.testing.assert_close(rank["state"], ranks[0]["state"], rtol=0, atol=0)


def test_ranks_with_one_seed_round_otherwise(answers: list[dict[str, Any]]) -> None:
    assert not torch.equal(*(answer["drawn"] for answer in answers))


def test_no_rank_hides_what_is_not_finite(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        assert not torch.stack(answer["poisoned"]).isfinite().any()


def main(folder: Path, rank: int) -> None:
    """Be one of the ranks, and leave its answers in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    torch.save(answer(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
