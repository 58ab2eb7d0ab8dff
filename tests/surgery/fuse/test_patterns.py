"""Test that norms of a block are fused, or refused with the reason, and the block computes alike.

Each block is a forward; its norms `a` and `b` are called on what `f` and `g`, convolutions, return.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmlightning import swap_norms
from nmlightning.norms.batch_norm_base import BatchNormBase
from nmlightning.surgery.norm_layers import fused_of

CHANNELS = 4
Forward = Callable[[Any, Tensor], Any]


def block(forward: Forward) -> nn.Module:
    """Return a module with that forward, two convolutions, two norms, a ReLU and an identity."""
    cls = type("Block", (nn.Module,), {"forward": forward})
    net: nn.Module = cls()
    net.f, net.g = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Conv2d(CHANNELS, CHANNELS, 1)
    net.a, net.b = nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)
    net.relu, net.same = nn.ReLU(inplace=True), nn.Identity()
    net.norms = nn.ModuleList([nn.BatchNorm2d(CHANNELS)])
    net.shift = nn.Parameter(torch.randn(CHANNELS, 1, 1))
    return net.double()


def plain_residual(self: Any, x: Tensor) -> Tensor:
    out = self.relu(self.a(self.f(x)))
    out = self.b(self.g(out))
    out += x
    return self.relu(out)


def late_residual(self: Any, x: Tensor) -> Tensor:
    out = self.b(self.g(x))
    shortcut = self.a(self.f(x))
    return F.relu(out + shortcut)


def in_a_list(self: Any, x: Tensor) -> Tensor:
    for norm in self.norms:
        x = F.relu(norm(self.f(x)))
    return x


def changed_elsewhere(self: Any, x: Tensor) -> Tensor:
    inner = self.f(x)
    other_name = inner
    inner += 1
    return F.relu(self.a(self.g(inner))) + other_name


FUSED: dict[str, tuple[Forward, dict[str, str]]] = {
    "plain residual": (plain_residual, {"a": "relu", "b": "add_relu"}),
    "late residual": (late_residual, {"b": "add_relu"}),
    "residual first": (
        lambda self, x: torch.relu(torch.add(x, self.a(self.f(x)))),
        {"a": "add_relu"},
    ),
    "through identities": (
        lambda self, x: self.relu(self.same(self.same(self.a(self.f(x))).add(x))),
        {"a": "add_relu"},
    ),
    "methods": (
        lambda self, x: self.b(self.g(self.a(self.f(x)).relu_())).add_(x).relu(),
        {"a": "relu", "b": "add_relu"},
    ),
    "in a list": (in_a_list, {"norms.0": "relu"}),
    "before the convolution": (
        lambda self, x: self.f(F.relu(input=self.a(input=x), inplace=True)) + x,
        {"a": "relu"},
    ),
    "added parameter": (lambda self, x: F.relu(self.a(x) + self.shift), {"a": "add_relu"}),
    "changed elsewhere": (changed_elsewhere, {"a": "relu"}),
}


def norm_is_kept(self: Any, x: Tensor) -> Any:
    out = self.a(x)
    return self.relu(out) + out


def sum_is_kept(self: Any, x: Tensor) -> Any:
    out = self.a(x) + x
    return F.relu(out), out


def twice_itself(self: Any, x: Tensor) -> Tensor:
    out = self.a(x)
    return F.relu(out + out)


def into_the_shortcut(self: Any, x: Tensor) -> Tensor:
    shortcut = self.g(x)
    shortcut += self.a(self.f(x))
    return F.relu(shortcut)


def input_changes(self: Any, x: Tensor) -> Tensor:
    inner = self.f(x)
    out = self.a(inner)
    shortcut = inner.mul_(2)
    return F.relu(out + shortcut)


def alias_changes(self: Any, x: Tensor) -> Tensor:
    inner = self.f(x)
    out = self.a(self.same(inner))
    return F.relu(out + inner.mul_(2))


NO_TENSOR = "what is added to it is not a tensor of the same forward, or is scaled"
REFUSED: dict[str, tuple[Forward, str]] = {
    "other activation": (
        lambda self, x: F.relu6(self.a(x)) + F.leaky_relu(self.b(x)),
        "relu6 follows it in Block",
    ),
    "norm is kept": (norm_is_kept, "its output goes to several places"),
    "sum is kept": (sum_is_kept, "no ReLU follows the addition"),
    "called twice": (
        lambda self, x: F.relu(self.a(self.f(F.relu(self.a(x))))),
        "it is called 2 times",
    ),
    "scaled": (lambda self, x: F.relu(torch.add(self.a(x), x, alpha=2)), NO_TENSOR),
    "a number": (lambda self, x: F.relu(self.a(x) + 1), NO_TENSOR),
    "twice itself": (twice_itself, NO_TENSOR),
    "into the shortcut": (into_the_shortcut, "it is added to another tensor in place"),
    "input changes": (input_changes, "its input is used elsewhere before the addition"),
    "alias changes": (alias_changes, "its input is used elsewhere before the addition"),
    "nothing after": (lambda self, x: self.a(x), "nothing follows it in Block"),
    "not called": (lambda self, x: x, "no forward calls it"),
    "subtracted": (lambda self, x: F.relu(self.a(x) - x), "sub follows it in Block"),
}


def fused(net: nn.Module) -> dict[str, str]:
    return {n: f for n, m in net.named_modules() if (f := fused_of(m)) is not None}


def trained(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Return outputs and gradients in training, and the output in evaluation afterwards."""
    x = x.clone().requires_grad_()
    y = net.train()(x * 1)
    y = torch.cat(y) if isinstance(y, tuple) else y
    parameters = list(net.parameters())
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(y.shape, dtype=y.dtype, generator=generator)
    gradients = torch.autograd.grad(y, [x, *parameters], grad, allow_unused=True)
    evaluated = net.eval()(x.detach() * 1)
    evaluated = torch.cat(evaluated) if isinstance(evaluated, tuple) else evaluated
    return [y, *(g for g in gradients if g is not None), evaluated, *net.buffers()]


def check_same(net: nn.Module, other: nn.Module) -> None:
    x = torch.randn(3, CHANNELS, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(trained(net, x), trained(other, x))


@pytest.mark.parametrize(("forward", "expected"), FUSED.values(), ids=FUSED)
@pytest.mark.parametrize("norm", ["l1", "top10"])
def test_fused_blocks_compute_the_same(
    forward: Forward, expected: dict[str, str], norm: str
) -> None:
    net = block(forward)
    twin = copy.deepcopy(net)
    swap_norms(twin, norm)
    report = swap_norms(net, norm, fuse="add_relu")
    assert fused(net) == expected
    assert {s.name: s.after for s in report.fused} == expected
    check_same(net, twin)


@pytest.mark.parametrize(("forward", "expected"), FUSED.values(), ids=FUSED)
def test_fuse_relu_leaves_additions(forward: Forward, expected: dict[str, str]) -> None:
    net, twin = block(forward), block(forward)
    twin.load_state_dict(net.state_dict())
    swap_norms(twin, "l1")
    report = swap_norms(net, "l1", fuse="relu")
    assert fused(net) == {n: f for n, f in expected.items() if f == "relu"}
    added = {n for n, f in expected.items() if f == "add_relu"}
    reasons = {s.name: s.reason for s in report.not_fused}
    assert all("an addition follows it" in reasons[name] for name in added)
    check_same(net, twin)


@pytest.mark.parametrize(("forward", "reason"), REFUSED.values(), ids=REFUSED)
def test_unfusable_patterns_are_refused_with_the_reason(forward: Forward, reason: str) -> None:
    net = block(forward)
    twin = copy.deepcopy(net)
    swap_norms(twin, "l1")
    report = swap_norms(net, "l1", fuse="add_relu")
    assert fused(net) == {}
    assert {s.name: s.reason for s in report.not_fused}["a"] == reason
    assert type(net) is type(twin)
    x = torch.randn(3, CHANNELS, 5, 6, dtype=torch.float64)
    with torch.no_grad():  # some change what a backward would need
        torch.testing.assert_close(net(x.clone()), twin(x.clone()), rtol=0, atol=0)


def test_fused_in_place_addition_keeps_the_dtype() -> None:
    """And another one gives the wider of both, as torch has it."""

    def in_place(self: Any, x: Tensor, wide: Tensor) -> Tensor:
        out = self.a(x)
        out += wide
        return F.relu(out)

    def plain(self: Any, x: Tensor, wide: Tensor) -> Tensor:
        return F.relu(self.a(x) + wide)

    x = torch.randn(3, CHANNELS, 5, 6)
    for forward, dtype in ((in_place, torch.float32), (plain, torch.float64)):
        net = block(forward).float()
        swap_norms(net, "l1")
        expected = net(x, x.double())
        swap_norms(net, "l1", fuse="add_relu")
        assert fused(net) == {"a": "add_relu"}
        assert expected.dtype == net(x, x.double()).dtype == dtype
        torch.testing.assert_close(net(x, x.double()), expected)


def test_fused_residual_of_another_shape_is_broadcast() -> None:
    net = block(lambda self, x: F.relu(self.a(x) + x.mean((2, 3), keepdim=True)))
    twin = copy.deepcopy(net)
    swap_norms(net, "l1", fuse="add_relu")
    swap_norms(twin, "l1")
    assert fused(net) == {"a": "add_relu"}
    check_same(net, twin)


@pytest.mark.parametrize("hooked", ["a", "relu"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_norms_and_relus_with_hooks_are_refused(hooked: str, kind: str) -> None:
    """They would see the activated output, or nothing."""
    for net in (block(lambda self, x: self.relu(self.a(x))), nn.Sequential()):
        if isinstance(net, nn.Sequential):
            net.add_module("a", nn.BatchNorm2d(CHANNELS))
            net.add_module("relu", nn.ReLU())
        register = getattr(net.get_submodule(hooked), f"register_{kind}_hook")
        register(lambda *_: None)
        report = swap_norms(net, "l1", include=["a"], fuse="relu")
        assert len(report.fused) == 0
        assert "has hooks" in report.not_fused[0].reason


def test_norm_with_two_parents_is_refused() -> None:
    net = nn.ModuleList([block(plain_residual), block(plain_residual)])
    net[1].a = net[0].a
    report = swap_norms(net, "l1", fuse="add_relu")
    reasons = {s.name: s.reason for s in report.not_fused}
    assert reasons["0.a"] == "it is used as a, a"
    assert fused(net[0]) == fused(net[1]) == {"b": "add_relu"}
    assert all(isinstance(net[i].a, BatchNormBase) for i in (0, 1))


def test_module_with_two_names_is_fused_once() -> None:
    inner = block(plain_residual)
    net, twin = nn.Sequential(inner, inner), copy.deepcopy(nn.Sequential(inner, inner))
    swap_norms(twin, "l1")
    swap_norms(net, "l1", fuse="add_relu")
    assert net[0] is net[1]
    check_same(net, twin)
