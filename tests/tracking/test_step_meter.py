"""Each quantity of a step equals its definition, in float64, for weights that are whole or shards.

Run as a script it is one of two or four ranks: `python test_step_meter.py FOLDER WORLD RANK`.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from nmlightning import track_norms
from nmlightning.tracking.step_meter import QUANTITIES
from optim_rules import channel_angles
from scripts import run_ranks

STEPS, CLIP, RATE, DECAY = 5, 0.5, 0.1, 0.02
OPTIMIZERS: dict[str, tuple[Callable[..., Any], float, int]] = {
    "SGD": (lambda q: torch.optim.SGD(q, RATE, momentum=0.9, weight_decay=DECAY), 0.9, 2),
    "AdamW": (lambda q: torch.optim.AdamW(q, RATE, weight_decay=DECAY), 0.0, 1),
}
LAYERS = ("0", "1", "4", "missed")


class Net(nn.Sequential):
    """A convolution, a transposed one, a linear layer, and one that gets no gradient."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 4, 3),
            nn.ConvTranspose2d(4, 2, 2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(50, 6),
        )
        self.missed = nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for module in list(self)[:-1]:
            x = module(x)
        return x


def train(net: nn.Module, make: Callable[..., Any]) -> Iterator[tuple[Any, Any, Any]]:
    """Yield what a log gets, and each layer's weight and gradients, in a loop that clips."""
    torch.manual_seed(3)
    optimizer = make(net.parameters())
    logged: list[dict[str, float]] = []
    tracker = track_norms(
        net, optimizer, quantities=QUANTITIES, log=lambda values, _: logged.append(values)
    )
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = net(torch.randn(8, 2, 6, 6, dtype=torch.float64)).square().sum()
        loss.backward()
        before = {k: whole(net.get_submodule(k).weight) for k in LAYERS}
        unclipped = {k: whole(net.get_submodule(k).weight.grad) for k in LAYERS}
        tracker.measure()
        for q in net.parameters():
            if q.grad is not None:
                q.grad.clamp_(-CLIP, CLIP)
        gradients = {k: whole(net.get_submodule(k).weight.grad) for k in LAYERS}
        optimizer.step()
        after = {k: whole(net.get_submodule(k).weight) for k in LAYERS}
        tensors = {k: (before[k], after[k], unclipped[k], gradients[k]) for k in LAYERS}
        yield logged[-1] if logged else {}, tensors, tracker  # the first rank logs


def whole(tensor: Any) -> Any:
    if tensor is None:
        return None
    return getattr(tensor, "full_tensor", lambda: tensor)().detach().clone()


def rows(tensor: Tensor | None, layer: str) -> Tensor:
    if tensor is None:
        return torch.full((2, 4), torch.nan)
    return (tensor.transpose(0, 1) if layer == "1" else tensor).flatten(1)


def define(layer: str, tensors: Any, momentum: float, power: int) -> dict[str, float]:
    before, after, unclipped, gradient = (rows(x, layer) for x in tensors)
    step, norms = after - before, after.norm(dim=1)

    def rms(x: Tensor) -> Tensor:
        return x.norm(dim=1).square().mean().sqrt()

    defined = {
        "weight_norm/{}/min": norms.min(),
        "weight_norm/{}/mean": norms.mean(),
        "weight_norm/{}/max": norms.max(),
        "step_norm/{}": rms(step),
        "update_ratio/{}": step.norm() / before.norm(),
        "rotation/{}": channel_angles(before, after).square().mean().sqrt(),
        "gradient_norm/{}": rms(gradient),
        "unclipped_gradient_norm/{}": rms(unclipped),
        "weight_gradient_cosine/{}": (before * gradient).sum() / (before.norm() * gradient.norm()),
        "effective_lr/{}": RATE / (1 - momentum) / norms.median() ** power,
    }
    return {tag.format(layer): float(value) for tag, value in defined.items()}


def check(logged: dict[str, float], weights: dict[str, Any], of: str) -> None:
    for layer, tensors in weights.items():
        expected = define(layer, tensors, *OPTIMIZERS[of][1:])
        if layer == "missed":
            assert not [tag for tag in logged if "gradient" in tag and "missed" in tag]
        found = {tag: logged.get(tag, torch.nan) for tag in expected}
        # Values are brought from the device in float32, which rounds to 6e-8; the effective rate
        # follows from the square of such a median.
        assert found == pytest.approx(expected, rel=5e-7, nan_ok=True)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_quantities_are_what_they_are_defined_to_be(name: str) -> None:
    for logged, weights, _ in train(Net(), OPTIMIZERS[name][0]):
        check(logged, weights, name)
        sizes = [logged[f"weight_norm/{layer}/max"] for layer in LAYERS]
        assert logged["weight_norm/all/max"] == max(sizes)
    assert weights["0"][2].abs().max() > CLIP  # of what clipping has to do


def test_spectral_norm_follows_the_weights() -> None:
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 1e-4)
    logged: list[dict[str, float]] = []
    with track_norms(
        net, optimizer, quantities=["spectral_norm"], log=lambda v, _: logged.append(v)
    ):
        for step in range(100):
            if step == 5:  # one weight is lost for a step
                kept = net[4].weight.detach().clone()
                net[4].weight.data[0, 0] = torch.inf
                optimizer.step()
                net[4].weight.data.copy_(kept)
            optimizer.zero_grad()
            net(torch.randn(8, 2, 6, 6, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
    for layer in ("0", "1", "4"):
        expected = torch.linalg.matrix_norm(
            rows(net.get_submodule(layer).weight.detach(), layer), 2
        )
        found = logged[-1][f"spectral_norm/{layer}"]
        assert found == pytest.approx(float(expected), rel=1e-3)  # the weights move meanwhile
        assert found <= float(expected) * (1 + 1e-6)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("stepping", [["d"] * 4, ["dg"] * 4, ["dg", "d", "dg", "dg"]])
def test_unclipped_gradients_are_of_the_step_that_takes_them(stepping: Any, every: int) -> None:
    net = nn.ModuleDict({"d": nn.Linear(2, 2), "g": nn.Linear(2, 2)})
    optimizers = {name: torch.optim.SGD(part.parameters(), 0.1) for name, part in net.items()}
    logged: dict[int, dict[str, float]] = {}
    chosen = ["gradient_norm", "unclipped_gradient_norm"]
    tracker = track_norms(
        net, [*optimizers.values()], every=every, log=lambda v, step: logged.update({step: v}),
        quantities=chosen,
    )  # fmt: skip
    sizes: dict[tuple[int, str], float] = {}
    for step, names in enumerate(stepping, 1):
        for number, name in enumerate(names, 1):
            sizes[step, name] = number * 10.0**step
            for part in net.values():  # a backward of g's reaches d, too
                part.weight.grad = torch.full((2, 2), sizes[step, name])
            tracker.measure()
            optimizers[name].step()
    tracker.close()
    assert list(logged) == list(range(every, 5, every))
    for step, values in logged.items():
        for name in net:
            found = [values.get(f"{quantity}/{name}", 0.0) for quantity in chosen]
            assert found == pytest.approx([sizes.get((step, name), 0.0) * 2**0.5] * 2)


@pytest.mark.parametrize("fused", [False, True])
def test_scale_of_a_grad_scaler_is_divided_out(fused: bool) -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    logged: list[dict[str, float]] = []
    chosen = ["gradient_norm", "unclipped_gradient_norm", "weight_gradient_cosine"]
    tracker = track_norms(net, optimizer, quantities=chosen, log=lambda v, _: logged.append(v))
    for value in (1.0, torch.inf, 2.0):
        optimizer.zero_grad()
        loss = value * net(torch.ones(2, 4)).square().sum()
        weight = net.weight.detach().clone()
        (gradient,) = torch.autograd.grad(loss, net.weight, retain_graph=True)
        scaler.scale(loss).backward()
        tracker.measure(scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        if value == torch.inf:
            assert len(logged) == 1 + fused  # otherwise the optimizer is not called
            continue
        expected = float(gradient.norm() / 3**0.5)
        assert logged[-1]["gradient_norm/weight"] == pytest.approx(expected, rel=1e-5)
        assert logged[-1]["unclipped_gradient_norm/weight"] == pytest.approx(expected, rel=1e-5)
        cosine = float(F.cosine_similarity(weight.flatten(), gradient.flatten(), 0))
        assert logged[-1]["weight_gradient_cosine/weight"] == pytest.approx(cosine, rel=1e-5)
    assert tracker.step == 2 + fused


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_measured_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Linear(64, 8, bias=False).to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    logged: list[dict[str, float]] = []
    before = net.weight.detach().clone()
    with track_norms(
        net, optimizer, quantities=["step_norm", "rotation"], log=lambda v, _: logged.append(v)
    ):
        net.weight.grad = torch.randn_like(net.weight)
        optimizer.step()
    step = net.weight.detach().double() - before.double()
    found = logged[0]["step_norm/weight"]
    assert found == pytest.approx(float(step.norm() / 8**0.5), rel=1e-6)
    angles = channel_angles(before, net.weight)
    assert logged[0]["rotation/weight"] == pytest.approx(float(angles.square().mean().sqrt()))


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernels_measure_the_same(dtype: torch.dtype) -> None:
    test_half_weights_are_measured_in_float32(dtype)


def test_a_logged_step_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each `tolist`, `item` or `bool` of a tensor on a device is a wait."""
    waits: list[str] = []
    for name in ("tolist", "item", "__bool__", "__float__", "__int__"):
        method = getattr(Tensor, name)
        monkeypatch.setattr(
            Tensor, name, lambda x, m=method, n=name, *a: (waits.append(n), m(x, *a))[1]
        )
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    logged: list[Any] = []
    tracker = track_norms(net, optimizer, quantities=QUANTITIES, log=lambda *v: logged.append(v))
    net(torch.randn(8, 2, 6, 6, dtype=torch.float64)).square().mean().backward()
    waits.clear()
    tracker.measure()
    optimizer.step()
    assert waits == ["tolist"]
    tracker.remove()
    optimizer.step()
    assert len(logged) == 1


def compare_shards(rank: int, dim: int, name: str) -> None:
    """Compare training with weights that are sharded along a dimension with the definition."""
    mesh, make = init_device_mesh("cpu", (2,)), OPTIMIZERS[name][0]
    torch.manual_seed(0)
    expected = list(train(Net(), make))
    torch.manual_seed(0)
    net, template = Net(), Net()
    for module in map(net.get_submodule, LAYERS):
        module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Shard(dim)]))

    def forward(x: Tensor) -> Any:
        whole = {k: getattr(q, "full_tensor", lambda q=q: q)() for k, q in net.named_parameters()}
        return torch.func.functional_call(template, whole, (x,))

    net.forward = forward  # type: ignore[method-assign]
    for (logged, weights, tracker), (other, _, _) in zip(train(net, make), expected, strict=True):
        if rank == 0:
            check(logged, weights, name)
            spectral = {k: v for k, v in other.items() if k.startswith("spectral")}
            assert {k: logged[k] for k in spectral} == pytest.approx(spectral, rel=1e-6)
        for layer in LAYERS:
            found = torch.from_numpy(tracker.history.norms[f"{layer}.weight"][-1].copy())
            norms = rows(weights[layer][1], layer).norm(dim=1).float()
            torch.testing.assert_close(found, norms, rtol=2e-7, atol=0)


def compare_meshes(rank: int) -> None:
    """Compare FSDP2 around tensor parallelism, with uneven shards, with one process."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    logs: list[list[dict[str, float]]] = []
    norms = []
    for is_sharded in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Linear(5, 3))
        if is_sharded:
            parallelize_module(net, mesh["tensor"], plan)
            for module in (net[0], net[2], net):
                fully_shard(module, mesh=mesh["data"])
        optimizer = torch.optim.AdamW(net.parameters(), 0.05, weight_decay=0.1)
        logs.append([])
        tracker = track_norms(
            net, optimizer, quantities=QUANTITIES, log=lambda values, _: logs[-1].append(values)
        )
        for step in range(3):
            torch.manual_seed(step)
            net(torch.randn(4, 6)).square().mean().backward()
            tracker.measure()
            optimizer.step()
            optimizer.zero_grad()
        norms.append(np.concatenate([*tracker.history.norms.values()], axis=1))
    np.testing.assert_allclose(*norms, rtol=1e-4)  # in the order of the channels
    if rank == 0:
        for whole, sharded in zip(*logs, strict=True):
            assert sharded == pytest.approx(whole, rel=1e-4)  # ranks sum in another order
            assert len(sharded) > 30


def main(folder: Path, world: int, rank: int) -> None:
    dist.init_process_group("gloo", f"file://{folder}/{world}", rank=rank, world_size=world)
    if world == 4:
        compare_meshes(rank)
    else:
        for dim in (0, 1):
            for name in OPTIMIZERS:
                compare_shards(rank, dim, name)
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_shards_of_any_dimension_equal_the_whole(tmp_path: Path, world: int) -> None:
    run_ranks(world, __file__, tmp_path, world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
