"""Test when a normalised weight is computed, from what, and how it is projected after a step."""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from nmlightning import InputError, apply_weight_norm, channel_norms, remove_weight_norm
from nmlightning.parametrizations import weight_norm
from nmlightning.parametrizations.normalize import normalise_weight

NORMS = [1.0, 2.0, math.inf]


def sgd(net: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr, momentum=0.9)


def step(net: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    net(images).square().mean().backward()
    optimizer.step()


def original(module: Any, name: str = "weight") -> nn.Parameter:
    return module.parametrizations[name].original  # type: ignore[no-any-return]


def tied() -> nn.ModuleDict:
    net = nn.ModuleDict({"first": nn.Linear(3, 4), "second": nn.Linear(3, 4)})
    net["second"].weight = net["first"].weight
    return net


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was normalised, of weights that nothing records."""
    calls: list[Any] = []

    def normalise(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return normalise_weight(*args, **kwargs)

    monkeypatch.setattr(weight_norm, "normalise_weight", normalise)
    return calls


def test_cached_computes_a_tied_weight_once(computed: list[Any]) -> None:
    net = tied()
    apply_weight_norm(net, include=["*.weight"])
    x, counts = torch.randn(2, 3), []
    for context in (nullcontext, parametrize.cached):
        computed.clear()
        net.zero_grad()
        with context():
            for _ in range(3):
                x = net["first"](x)[:, :3] + net["second"](x)[:, 1:]
        x.square().sum().backward()
        x = x.detach()
        counts.append(len(computed))
    assert counts == [6, 1]


@pytest.mark.parametrize("gain", ["none", "channel"])
def test_cached_changes_no_gradient(gain: Any) -> None:
    cell, x = nn.LSTMCell(3, 4).double(), torch.randn(5, 2, 3).double()
    apply_weight_norm(cell, layers=["recurrent"], gain=gain)
    gradients = []
    for context in (nullcontext, parametrize.cached):
        state = None
        with context():
            for each in x:
                state = cell(each, state)
        loss = state[0].square().sum()
        gradients.append(torch.autograd.grad(loss, list(cell.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_cached_keeps_a_tied_weight_apart_without_gradients() -> None:
    net = tied()
    apply_weight_norm(net, include=["*.weight"])
    with parametrize.cached():
        with torch.no_grad():
            assert not net["first"].weight.requires_grad
        assert net["second"].weight.requires_grad


CHANGES: dict[str, Callable[[Any], object]] = {
    "in place": lambda net: original(net[0]).add_(1),
    "through data": lambda net: original(net[0]).data.add_(1),
    "to zero": lambda net: original(net[0])[0].zero_(),
    "gain": lambda net: net[0].parametrizations.weight[0].gain.mul_(2),
    "rho": lambda net: net[0].parametrizations.weight[0].rho.mul_(2),
    "by loading": lambda net: net.load_state_dict(
        {k: v if k.endswith("order") else v + 1 for k, v in net.state_dict().items()}
    ),
}


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_weight_norm_sees_every_change(
    net: nn.Sequential, images: Tensor, change: str, mode: Any
) -> None:
    apply_weight_norm(net, "bounded" if change == "rho" else "weight")
    step(net, images, sgd(net))
    net.train(mode is nullcontext)
    with mode():
        before = net[0].weight
    with torch.no_grad():
        CHANGES[change](net)
    copied = copy.deepcopy(net)
    with mode():
        assert not torch.equal(net[0].weight, before)  # type: ignore[arg-type]
        assert torch.equal(net[0].weight, copied[0].weight)  # type: ignore[arg-type]


def test_frozen_weight_gets_no_gradient(net: nn.Sequential, images: Tensor) -> None:
    apply_weight_norm(net)
    net[0].requires_grad_(False)
    assert not net[0].weight.requires_grad  # type: ignore[union-attr]
    net(images).sum().backward()
    assert [original(net[i]).grad is None for i in (0, 2)] == [True, False]


def test_weight_norm_works_in_functional_transforms(net: nn.Sequential, images: Tensor) -> None:
    apply_weight_norm(net, "weight")
    parameters = dict(net.named_parameters())

    def loss(values: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(net, values, image[None]).square().mean()

    per_image = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    net.zero_grad()
    (net(images).square().mean(1).mean()).backward()
    for name, q in parameters.items():
        torch.testing.assert_close(per_image[name].mean(0), q.grad)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("made", ["before", "after"])
def test_project_keeps_norms(net: nn.Sequential, images: Tensor, p: float, made: str) -> None:
    optimizer = sgd(net) if made == "before" else None
    rho = apply_weight_norm(net, p=p, project=True).weights["0.weight"]
    optimizer = optimizer or sgd(net)
    for _ in range(5):
        step(net, images, optimizer)
        norms = channel_norms(original(net[0]), p)
        torch.testing.assert_close(norms, torch.full((8,), rho), rtol=1e-6, atol=0)


def test_project_changes_no_output(net: nn.Sequential, images: Tensor) -> None:
    twin = copy.deepcopy(net)
    apply_weight_norm(net, project=True)
    apply_weight_norm(twin)
    torch.testing.assert_close(net(images), twin(images))
    net[0].parametrizations["weight"].project()
    torch.testing.assert_close(net(images), twin(images))


def test_project_moves_nothing_when_states_load(net: nn.Sequential, images: Tensor) -> None:
    apply_weight_norm(net, p=1, project=True)
    step(net, images, used := sgd(net))
    before, state = original(net[0]).clone(), state_dict.get_optimizer_state_dict(net, used)
    net.zero_grad()
    state_dict.set_optimizer_state_dict(net, sgd(net), state)
    assert torch.equal(original(net[0]), before)


def test_project_follows_steps_of_its_own_optimizer_alone(
    net: nn.Sequential, images: Tensor
) -> None:
    apply_weight_norm(net, project=True)
    original(net[0]).data.add_(1)
    before = channel_norms(original(net[0]))
    step(net, images, sgd(net[5]))
    assert torch.equal(channel_norms(original(net[0])), before)


def test_project_holds_for_a_copy_and_ends_with_removal(net: nn.Sequential, images: Tensor) -> None:
    rho = apply_weight_norm(net, project=True).weights["0.weight"]
    copied, part = copy.deepcopy(net), copy.deepcopy(net[0])
    for module in (copied, part):
        step(module, images, sgd(module, 0.5))
    for module in (copied[0], part):
        torch.testing.assert_close(channel_norms(original(module)), torch.full((8,), rho))
        assert torch.equal(module.weight, copy.deepcopy(module).weight)  # type: ignore[arg-type]
    remove_weight_norm(net)
    step(net, images, sgd(net, 0.5))
    assert (channel_norms(net[0].weight) - rho).abs().max() > 1e-4  # type: ignore[arg-type]


@pytest.mark.parametrize("place", ["first", "second", "second, first replaced"])
def test_project_holds_for_a_copy_of_a_tied_weight(place: str) -> None:
    net = tied()
    rho = apply_weight_norm(net, project=True, include=["*.weight"]).weights["first.weight"]
    if place.endswith("replaced"):
        whole = copy.deepcopy(net)
        whole["first"] = nn.Linear(3, 4)
        copied = whole["second"]
    else:
        copied = copy.deepcopy(net[place])
    step(copied, torch.randn(2, 3), sgd(copied, 0.5))
    torch.testing.assert_close(channel_norms(original(copied)), torch.full((4,), rho))


@pytest.mark.usefixtures("_one_process")
def test_project_refuses_shards_of_a_transposed_convolution(images: Tensor) -> None:
    net = nn.Sequential(nn.ConvTranspose2d(3, 4, 2))
    apply_weight_norm(net, project=True)
    fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(InputError, match="are split over ranks"):
        step(net, images, torch.optim.SGD(net.parameters(), 0.1, foreach=False))


class Prunes(torch.optim.SGD):
    """Makes a channel zero in its step."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        with torch.no_grad():
            self.param_groups[0]["params"][0][1] = 0


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("form", [{}, {"gain": "channel"}, {"kind": "weight"}])
@pytest.mark.parametrize("project", [False, True])
def test_channel_may_become_zero(
    net: nn.Sequential, images: Tensor, p: float, form: dict[str, Any], project: bool
) -> None:
    apply_weight_norm(net, p=p, project=project, **form)
    optimizer = Prunes([original(net[0]), *net[2].parameters()], 0.1, momentum=0.9)
    for _ in range(3):
        step(net, images, optimizer)
        assert not net[0].weight[1].any()  # type: ignore[index]
        assert all(q.grad is None or q.grad.isfinite().all() for q in net.parameters())
        with torch.no_grad():
            assert net.eval()(images).isfinite().all()
        net.train()


@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_channel_too_small_for_its_square_is_zero(net: nn.Sequential, size: float) -> None:
    apply_weight_norm(net)
    original(net[0]).data[1] = size
    with torch.no_grad():
        assert not net[0].weight[1].any()  # type: ignore[index]
    assert not net[0].weight[1].any()  # type: ignore[index]


def test_gains_may_be_zero(net: nn.Sequential) -> None:
    apply_weight_norm(net, gain="channel")
    with torch.no_grad():
        net[0].parametrizations.weight[0].gain.zero_()  # type: ignore[index, union-attr]
    assert not net[0].weight.any()  # type: ignore[operator, union-attr]


class Branches(nn.Module):
    """Layers in parts that may be checkpointed: one in both parts, one in one, one in none."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.second, self.unused = (nn.Linear(3, 3) for _ in range(3))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> list[Tensor]:
        parts: list[Any] = [self.first, lambda x: self.second(self.first(x).relu())]
        if self.reentrant is None:
            return [part(x) for part in parts]
        return [checkpoint(part, x, use_reentrant=self.reentrant) for part in parts]  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("form", [{}, {"gain": "channel"}, {"kind": "weight", "p": 1}])
def test_weights_of_a_forward_are_those_of_single_reads(form: Any, reentrant: bool | None) -> None:
    net = Branches(reentrant)
    apply_weight_norm(net, include=["*.weight"], **form)
    alone, x, grads = copy.deepcopy(net), torch.randn(2, 3, requires_grad=True), []
    alone._forward_pre_hooks.clear()
    for each in (net, alone):
        for _ in range(3):  # from the second on, what the last one read is computed at once
            for output in each(x):  # two backward passes
                output.square().sum().backward()
        assert original(each.unused).grad is None
        grads.append([q.grad for q in each.parameters()])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("p", [1, 2, float("inf")])
def test_many_gradients_at_once_equal_single_ones(net: nn.Module, images: Tensor, p: float) -> None:
    apply_weight_norm(net, p=p)
    y, of = net(images), list(net.parameters())
    rows = torch.eye(5)[:, None].expand(5, 4, 5)
    many = torch.autograd.grad(y, of, rows, retain_graph=True, is_grads_batched=True)
    single = [torch.autograd.grad(y, of, row, retain_graph=True) for row in rows]
    stacked = tuple(map(torch.stack, zip(*single, strict=True)))
    torch.testing.assert_close(many, stacked)
