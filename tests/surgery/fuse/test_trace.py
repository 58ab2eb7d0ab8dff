"""Test that no forward is rewritten that a trace would change, and that tracing leaves nothing."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nmlightning import swap_norms
from nmlightning.surgery.fuse.trace import BlockTrace, trace_block

FLAGS = {"deep": False}


def on_types(self: Any, x: Any) -> Tensor:
    return F.relu(self.norm(torch.cat(x) if isinstance(x, list) else x))


def without_gradients(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return F.relu(self.norm(x))


def remembers(self: Any, x: Tensor) -> Tensor:
    self.seen = F.relu(self.norm(x))
    return self.seen


def collects(self: Any, x: Tensor) -> Tensor:
    self.calls.append(1)
    return F.relu(self.norm(x))


def counts(self: Any, x: Tensor) -> Tensor:
    self.counter += 1
    return F.relu(self.norm(x))


def recomputes(self: Any, x: Tensor) -> Any:
    return checkpoint(lambda x: F.relu(self.norm(x)), x, use_reentrant=False)


def optional(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.relu(self.norm(x)) if mask is None else x


def by_method(self: Any, x: Tensor) -> Tensor:
    return self.frozen(x)


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function(*args)

    return call


def of_a_global(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.norm(x)) if not FLAGS["deep"] else x


IN_TRAINING = "does one thing in training and another in evaluation"
REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "of an object": (
        lambda self, x: F.relu(self.norm(x)) if self.settings.act else x,
        "its forward reads settings, whose content may change",
    ),
    "of a global": (of_a_global, "its of_a_global reads FLAGS"),
    "of a helper": (lambda self, x: on_types(self, x), "its on_types checks types"),
    "in training": (
        lambda self, x: F.relu(self.norm(x)) if self.training else self.norm(x),
        IN_TRAINING,
    ),
    "dropout": (lambda self, x: F.dropout(F.relu(self.norm(x)), 0.1, self.training), IN_TRAINING),
    "on values": (
        lambda self, x: F.relu(self.norm(x)) if x.sum() > 0 else x,
        "torch.fx cannot trace its forward: symbolically traced variables",
    ),
    "on types": (on_types, "its on_types checks types"),
    "without gradients": (without_gradients, "its without_gradients switches gradients"),
    "remembers": (remembers, "its forward sets attributes"),
    "collects": (collects, "its forward reads calls, whose content may change"),
    "counts": (counts, "its forward sets attributes"),
    "at random": (
        lambda self, x: F.relu(self.norm(x)) if torch.rand(1) < 0.5 else x,
        "its forward draws random numbers",
    ),
    "constant": (
        lambda self, x: F.relu(self.norm(x)) * torch.tensor([2.0]),
        "its forward sets attributes",
    ),
    "recomputes": (recomputes, "its recomputes computes parts of it again in backward"),
    "optional": (optional, "its forward takes mask"),
    "any number": (lambda self, *x: F.relu(self.norm(x[0])), "its forward takes *x"),
    "by method": (by_method, "its without_gradients switches gradients"),
    "decorated": (decorated(by_method), "its by_method is decorated"),
}


def make(forward: Callable[..., Any]) -> nn.Module:
    members = {"forward": forward, "frozen": without_gradients}
    net: nn.Module = type("Block", (nn.Module,), members)()
    net.norm = nn.BatchNorm2d(3)
    net.calls, net.settings = [], SimpleNamespace(act=True)
    net.register_buffer("counter", torch.zeros(()))
    return net


@pytest.mark.parametrize(("forward", "reason"), REFUSED.values(), ids=REFUSED)
def test_swap_norms_refuses_forwards_that_a_trace_would_change(
    forward: Callable[..., Any], reason: str
) -> None:
    net = make(forward)
    net.norm.eval()
    before, random_numbers = dict(vars(net)), torch.get_rng_state()
    modules = [(module, module.training) for module in net.modules()]
    report = swap_norms(net, "l1", fuse="add_relu")
    assert len(report.fused) == 0
    assert report.not_fused[0].reason.startswith("in Block: ")
    assert reason in report.not_fused[0].reason
    assert vars(net) == before
    assert net.calls == []
    assert "_tensor_constant0" not in vars(net)
    assert [(module, module.training) for module in net.modules()] == modules
    assert torch.equal(torch.get_rng_state(), random_numbers)


def test_trace_block_checks_inherited_methods() -> None:
    base = type(make(without_gradients))
    child = type("Child", (base,), {"forward": lambda self, x: base.forward(self, x)})
    child.forward = lambda self, x: super(child, self).forward(x)
    answer = trace_block(child(), child)
    assert answer == "its without_gradients switches gradients"


def test_trace_block_reports_the_attributes_read() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.act(self.norm(x)) * self.scale if self.deep else self.norm(x)

    net = make(forward)
    net.act, net.scale, net.deep, net.other = F.relu, 2.0, True, None
    trace = trace_block(net, type(net))
    assert isinstance(trace, BlockTrace)
    assert trace.read == {"act", "scale", "deep"}


def with_replaced_forward() -> nn.Module:
    net = make(lambda self, x: F.relu(self.norm(x)))
    net.forward = net.forward
    return net


@pytest.mark.parametrize(
    ("make_net", "reason"),
    [
        (with_replaced_forward, "in Block: its forward was replaced on the object"),
        (
            lambda: torch.fx.symbolic_trace(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())),
            "copies and pickles in a way of its own",
        ),
        (lambda: nn.BatchNorm2d(3), "no module calls it"),
    ],
    ids=["replaced forward", "graph module", "the model itself"],
)
def test_swap_norms_leaves_norms_that_no_own_forward_calls(
    make_net: Callable[[], nn.Module], reason: str
) -> None:
    (left,) = swap_norms(make_net(), "l1", fuse="relu").not_fused
    assert reason in left.reason


def test_class_attributes_are_watched_on_the_module() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.relu(self.norm(x)) if self.act else self.norm(x)

    net = type("Block", (nn.Module,), {"forward": forward, "act": True})()
    net.norm = nn.BatchNorm2d(3)
    assert len(swap_norms(net, "l1", fuse="relu").fused) == 1
    with pytest.warns(UserWarning, match="act of Block was changed"):
        net.act = False
    assert (net(torch.randn(4, 3, 5, 5)) < 0).any()
