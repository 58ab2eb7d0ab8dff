"""Two and four processes equal one on their batches concatenated in rank order, for every norm.

Run as a script, this file is one rank of those that the tests compare with a single process.
"""

import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from batch_norm_contract import learned
from built_kernels import kernel_library, load_kernels
from nmlightning import norms
from nmlightning.errors import InputError
from nmlightning.kernels import norm_backend
from nmlightning.kernels.cpu.build import load_library
from nmlightning.kernels.interface import Fused
from nmlightning.surgery.swap import swap_norms
from scripts import run_ranks

NORMS: dict[str, dict[str, Any]] = {
    "L1": {},
    "LInf": {},
    "TopK-10": {"k": 10},
    "Lp-2": {"p": 2},
    "Lp-3.7": {"p": 3.7},
    "Range-3": {"chunks": 3},
    "MeanOnly": {},
}


@dataclass(frozen=True)
class Batch:
    """A batch of (N, 3, *spatial) whose samples the ranks divide."""

    samples: tuple[int, ...]
    spatial: tuple[int, ...] = (2, 3)
    dtype: torch.dtype = torch.float64
    whole_numbers: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def whole(self) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        shape = (sum(self.samples), 3, *self.spatial)
        if not self.whole_numbers:
            return (2 * torch.randn(shape, generator=generator, dtype=torch.float64) + 1).to(
                self.dtype
            )
        # Symmetrical, so that the mean is 0 without rounding and nearly all maxima are ties.
        half = torch.randint(-2, 3, (shape[0] // 2, *shape[1:]), generator=generator)
        return torch.cat([half, -half]).to(self.dtype)

    def gradient(self) -> Tensor:
        generator = torch.Generator().manual_seed(6)
        shape = (sum(self.samples), 3, *self.spatial)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

    def share(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return a rank's samples, and the gradient of their output."""
        return self.whole().split(self.samples)[rank], self.gradient().split(self.samples)[rank]


Answers = dict[int, list[dict[str, Any]]]  # of each rank, by the number of ranks
FLOAT32 = torch.float32
BATCHES = {
    "uneven": Batch((5, 2)),
    "fewer-than-k-on-rank-0": Batch((1, 20), spatial=(1,)),
    "fewer-than-k-on-rank-1": Batch((20, 1), spatial=(1,)),
    "empty-on-rank-0": Batch((0, 6)),
    "empty-on-rank-1": Batch((6, 0)),
    "ties-uneven": Batch((2, 8), spatial=(5,), whole_numbers=True),
    "float32": Batch((4, 3), dtype=FLOAT32),
    "float32-ties": Batch((2, 8), spatial=(5,), dtype=FLOAT32, whole_numbers=True),
    "bfloat16": Batch((4, 4), dtype=torch.bfloat16),
    "bare": Batch((9, 6), spatial=(), settings={"affine": False, "momentum": None}),
    "papers-constant": Batch((4, 3), settings={"constant": "paper"}),
    "stats-in-float64": Batch((4, 3), dtype=FLOAT32, settings={"stats_dtype": "float64"}),
    "pure-half-with-many-values": Batch(
        (60, 5), spatial=(32, 32), dtype=torch.float16, settings={"stats_dtype": "float16"}
    ),
    "pure-half": Batch((4, 3), dtype=torch.float16, settings={"stats_dtype": "float16"}),
    "four-uneven": Batch((5, 1, 2, 4)),
    "four-with-an-empty-one": Batch((3, 0, 2, 1)),
    "four-with-ties": Batch((1, 4, 2, 3), spatial=(5,), dtype=FLOAT32, whole_numbers=True),
    "float32-empty-on-rank-0": Batch((0, 6), dtype=FLOAT32),
    "float32-fewer-than-k-on-rank-0": Batch((1, 20), spatial=(1,), dtype=FLOAT32),
    "float32-four-with-an-empty-one": Batch((3, 0, 2, 1), dtype=FLOAT32),
    "float32-bare": Batch((9, 6), spatial=(), dtype=FLOAT32, settings={"affine": False}),
}
# What the kernels serve.
KERNEL_NORMS = ["L1", "LInf", "TopK-10"]
KERNEL_BATCHES = [
    name
    for name, batch in BATCHES.items()
    if batch.dtype in (FLOAT32, torch.bfloat16) and "stats_dtype" not in batch.settings
]
FUSED: list[Fused | None] = [None, "add_relu"]
WORLDS = sorted({len(batch.samples) for batch in BATCHES.values()})


NETS = [(norm, wrapper) for norm in ("l1", "mean") for wrapper in ("ddp", "fsdp2")]
NET_SAMPLES = {2: (5, 2), 4: (3, 1, 2, 1)}


def make(norm: str, batch: Batch) -> nn.Module:
    """Return a synchronised layer, whose parameters are the same on every rank."""
    wide = torch.float64 if batch.dtype == torch.float64 else torch.float32
    cls = getattr(norms, norm.split("-")[0] + "BatchNorm")
    settings = {key: batch.settings[key] for key in batch.settings if _has(norm, key)}
    layer = cls(3, **NORMS[norm], **settings, sync=True, dtype=wide)
    for offset, parameter in enumerate(learned(layer)):
        parameter.data = torch.linspace(0.5, 2, 3, dtype=wide) + offset
    return layer


def _has(norm: str, setting: str) -> bool:
    return norm != "MeanOnly" or setting != "constant"


def train(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Any]:
    """Return everything that one training step on x leaves."""
    leaf, residual = x.clone().requires_grad_(), (0.5 * x).requires_grad_()
    y = layer(leaf, residual) if layer.fused else layer(leaf)
    y.backward(grad)
    return {
        "output": y.detach(),
        "input gradient": leaf.grad,
        "residual gradient": residual.grad if layer.fused else torch.empty(0),
        "gradients": {name: p.grad for name, p in layer.named_parameters() if p.requires_grad},
        "statistics": dict(layer.named_buffers()),
    }


def train_net(norm: str, samples: tuple[int, ...], rank: int | None, wrapper: str) -> Any:
    """Return the state of a swapped net after three steps on this rank's share, or on all."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 1)]
    last = nn.SyncBatchNorm if wrapper == "fsdp2" else nn.BatchNorm2d  # which torch's DDP refuses
    net = nn.Sequential(*layers, last(3)).double()
    swap_norms(net, norm, {"sync": True})
    wrapped: nn.Module = net
    if wrapper == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(net)
    elif wrapper == "fsdp2":
        fully_shard(net, mesh=init_device_mesh("cpu", (len(samples),)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    x = Batch(samples).whole()
    share = x if rank is None else x.split(samples)[rank]
    for _ in range(3):
        optimizer.zero_grad()
        # The wrappers average the ranks' gradients; one process has the mean over all samples.
        loss = wrapped(share).pow(3).sum() / len(x) * (1 if rank is None else len(samples))
        loss.backward()
        optimizer.step()
    return {
        name: getattr(q, "full_tensor", lambda q=q: q)() for name, q in net.state_dict().items()
    }


def count_collectives(norm: str, dtype: torch.dtype = torch.float64) -> tuple[int, int]:
    """Return how often a layer's forward and its backward make the ranks wait for each other."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather"):
            original = getattr(dist, name)

            def counted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
                calls.append(1)
                return original(*args, **kwargs)

            patch.setattr(dist, name, counted)
        layer = make(norm, BATCHES["uneven"]).to(dtype)
        y = layer(torch.randn(20, 3, 2, dtype=dtype).requires_grad_())
        forward = len(calls)
        y.sum().backward()
    return forward, len(calls) - forward


def answer(rank: int, world: int) -> dict[str, Any]:
    """Return what this rank gets for every norm and batch, and for the calls that fail."""
    results: dict[str, Any] = {}
    for norm in NORMS:
        results[f"{norm} collectives"] = count_collectives(norm)
        for name, batch in BATCHES.items():
            if len(batch.samples) == world:
                results[f"{norm} {name}"] = train(make(norm, batch), *batch.share(rank))
    for norm, wrapper in NETS:
        results[f"{norm} in {wrapper}"] = train_net(norm, NET_SAMPLES[world], rank, wrapper)
    return results | (answer_of_two(rank) if world == 2 else {})


def answer_by_kernels(rank: int, world: int) -> dict[str, Any]:
    """Return what this rank gets where the kernels compute the stages."""
    results: dict[str, Any] = {}
    for norm in KERNEL_NORMS:
        results[f"kernels {norm} collectives"] = count_collectives(norm, FLOAT32)
        for name, fused in itertools.product(KERNEL_BATCHES, FUSED):
            batch = BATCHES[name]
            if len(batch.samples) == world:
                layer = make(norm, batch)
                layer.fused = fused
                results[f"kernels {norm} {name} {fused}"] = train(layer, *batch.share(rank))
    return results


def answer_of_two(rank: int) -> dict[str, Any]:
    """Return what one of two ranks gets besides."""
    results: dict[str, Any] = {}
    for norm in ("TopK-10", "Range-3"):
        for constant in ("exact", "none", 0.5):
            layer = make(norm, Batch((1, 2), settings={"constant": constant}))
            length = 3 if norm == "TopK-10" else 1
            try:
                layer(torch.randn(rank + 1, 3, length, dtype=torch.float64))
            except InputError as error:
                results[f"{norm} too few {constant}"] = str(error)
    poisoned = BATCHES["uneven"].whole()
    poisoned[0, 1] = torch.inf
    for norm in NORMS:
        try:
            make(norm, BATCHES["bare"])(torch.randn(1 - rank, 3, dtype=torch.float64))
        except ValueError as error:
            results[f"{norm} single"] = str(error)
        layer = make(norm, BATCHES["uneven"])
        layer(poisoned.split((5, 2))[rank])
        results[f"{norm} poisoned"] = dict(layer.named_buffers())
        # No rank waits for another: only rank 0 evaluates.
        if rank == 0:
            layer.eval()(BATCHES["uneven"].whole())
    try:
        norms.HalfL2BatchNorm2d(3, sync=True)(torch.randn(2, 3, 4, 4))
    except InputError as error:
        results["half_l2"] = str(error)
    return results


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Return each rank's results by the number of ranks: one group of processes for all tests."""
    try:
        library = str(kernel_library())
    except pytest.skip.Exception:
        library = ""  # the tests of the kernels are skipped one by one
    given = {}
    for world in WORLDS:
        folder = tmp_path_factory.mktemp("ranks")
        run_ranks(world, __file__, folder, world, library)
        given[world] = [torch.load(folder / f"{rank}.pt") for rank in range(world)]
    return given


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", BATCHES)
def test_ranks_equal_one_process_by_the_formula(answers: Answers, norm: str, name: str) -> None:
    batch = BATCHES[name]
    alone = train(make(norm, batch), batch.whole(), batch.gradient())
    ranks = [answer[f"{norm} {name}"] for answer in answers[len(batch.samples)]]
    check_ranks(ranks, alone, batch)


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("norm", KERNEL_NORMS)
@pytest.mark.parametrize("name", KERNEL_BATCHES)
def test_ranks_equal_one_process_by_the_kernels(
    answers: Answers, norm: str, name: str, fused: Fused | None
) -> None:
    load_kernels()
    batch = BATCHES[name]
    layer = make(norm, batch)
    layer.fused = fused
    with norm_backend("auto"):
        alone = train(layer, batch.whole(), batch.gradient())
    given = answers[len(batch.samples)]
    check_ranks([answer[f"kernels {norm} {name} {fused}"] for answer in given], alone, batch)
    assert all(answer[f"kernels {norm} collectives"] == (2, 1) for answer in given)


def check_ranks(ranks: list[dict[str, Any]], alone: dict[str, Any], batch: Batch) -> None:
    # Sums in another order; for bfloat16 one rounding more where they straddle two of its values,
    # and in pure half the few roundings of trees that differ.
    close = {
        torch.float64: {"rtol": 1e-11, "atol": 1e-11},
        torch.float32: {"rtol": 1e-6, "atol": 1e-6},
        torch.bfloat16: {"rtol": 2**-7, "atol": 2**-7},
        torch.float16: {"rtol": 2**-6, "atol": 2**-6},
    }[batch.dtype]
    for key in ("output", "input gradient", "residual gradient"):
        torch.testing.assert_close(torch.cat([rank[key] for rank in ranks]), alone[key], **close)
    summed = {
        parameter: sum(rank["gradients"][parameter] for rank in ranks)
        for parameter in alone["gradients"]
    }
    # Sums of n terms of about 1, whose roundings add up as those do.
    n = batch.whole().numel() // 3
    torch.testing.assert_close(
        summed, alone["gradients"], rtol=close["rtol"], atol=close["atol"] * n**0.5
    )
    for rank in ranks:
        torch.testing.assert_close(rank["statistics"], alone["statistics"], **close)
        torch.testing.assert_close(rank["statistics"], ranks[0]["statistics"], rtol=0, atol=0)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("norm", NORMS)
def test_ranks_use_at_most_two_collectives_and_one(answers: Answers, norm: str, world: int) -> None:
    for answer in answers[world]:
        assert answer[f"{norm} collectives"] == (1 if norm == "MeanOnly" else 2, 1)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("norm", "wrapper"), NETS)
def test_swapped_net_trains_on_uneven_ranks_as_in_one_process(
    answers: Answers, norm: str, wrapper: str, world: int
) -> None:
    alone = train_net(norm, NET_SAMPLES[world], None, "")
    for answer in answers[world]:
        # Sums in another order, over three steps.
        torch.testing.assert_close(answer[f"{norm} in {wrapper}"], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("constant", ["exact", "none", "0.5"])
def test_too_few_elements_on_all_ranks_are_an_error(answers: Answers, constant: str) -> None:
    for answer in answers[2]:
        assert "k = 10 largest of n = 9 values a channel" in answer[f"TopK-10 too few {constant}"]
        assert "3 chunks of n = 3 values a channel" in answer[f"Range-3 too few {constant}"]


@pytest.mark.parametrize("norm", NORMS)
def test_infinity_on_one_rank_leaves_running_statistics_alone(answers: Answers, norm: str) -> None:
    fresh = make(norm, BATCHES["uneven"])
    clean = train(fresh, BATCHES["uneven"].whole(), BATCHES["uneven"].gradient())["statistics"]
    for answer in answers[2]:
        buffers = answer[f"{norm} poisoned"]
        assert buffers["running_mean"][1] == 0
        assert buffers["running_var"][1] == make(norm, BATCHES["uneven"]).running_var[1]
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(buffers[name][[0, 2]], clean[name][[0, 2]])


@pytest.mark.parametrize("norm", NORMS)
def test_one_value_on_all_ranks_is_an_error(answers: Answers, norm: str) -> None:
    for answer in answers[2]:
        assert answer[f"{norm} single"] == (
            "Expected more than 1 value per channel when training, got 1 on all ranks"
        )


def test_half_l2_rejects_ranks(answers: Answers) -> None:
    for answer in answers[2]:
        assert "HalfL2BatchNorm2d cannot share its statistics among ranks" in answer["half_l2"]


def main(folder: Path, world: int, library: str, rank: int) -> None:
    """Be one of the ranks, and leave its answers in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    with norm_backend("formula"):
        results = answer(rank, world)
    if library:
        load_library(Path(library))
        results |= answer_by_kernels(rank, world)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
