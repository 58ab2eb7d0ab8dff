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


def in_training(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.norm(x)) if self.training else self.norm(x)


def dropout(self: Any, x: Tensor) -> Tensor:
    return F.dropout(F.relu(self.norm(x)), 0.1, self.training)


def on_values(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.norm(x)) if x.sum() > 0 else x


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


def at_random(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.norm(x)) if torch.rand(1) < 0.5 else x


def constant(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.norm(x)) * torch.tensor([2.0])


def recomputes(self: Any, x: Tensor) -> Any:
    return checkpoint(lambda x: F.relu(self.norm(x)), x, use_reentrant=False)


def optional(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.relu(self.norm(x)) if mask is None else x


def any_number(self: Any, *x: Tensor) -> Tensor:
    return F.relu(self.norm(x[0]))


def by_method(self: Any, x: Tensor) -> Tensor:
    return self.frozen(x)


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function(*args)

    return call


def of_an_object(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.norm(x)) if self.settings.act else x


def of_a_global(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.norm(x)) if not FLAGS["deep"] else x


def of_a_helper(self: Any, x: Tensor) -> Tensor:
    return on_types(self, x)


REFUSED = {
    of_an_object: "its forward reads settings, whose content may change",
    of_a_global: "its of_a_global reads FLAGS",
    of_a_helper: "its on_types asks for types",
    in_training: "does one thing in training and another in evaluation",
    dropout: "does one thing in training and another in evaluation",
    on_values: "torch.fx cannot trace its forward: symbolically traced variables",
    on_types: "its on_types asks for types",
    without_gradients: "its without_gradients switches gradients",
    remembers: "its forward sets attributes",
    collects: "its forward reads calls, whose content may change",
    counts: "its forward sets attributes",
    at_random: "its forward draws random numbers",
    constant: "its forward sets attributes",
    recomputes: "its recomputes computes parts of it again in backward",
    optional: "its forward takes mask",
    any_number: "its forward takes *x",
    by_method: "its without_gradients switches gradients",
    decorated(by_method): "its by_method is decorated",
}


def make(forward: Callable[..., Any]) -> nn.Module:
    members = {"forward": forward, "frozen": without_gradients}
    net: nn.Module = type("Block", (nn.Module,), members)()
    net.norm = nn.BatchNorm2d(3)
    net.calls, net.settings = [], SimpleNamespace(act=True)
    net.register_buffer("counter", torch.zeros(()))
    return net


@pytest.mark.parametrize(("forward", "reason"), REFUSED.items(), ids=lambda f: str(f)[:20])
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


def test_swap_norms_leaves_a_replaced_forward() -> None:
    net = make(lambda self, x: F.relu(self.norm(x)))
    net.forward = net.forward
    (left,) = swap_norms(net, "l1", fuse="relu").not_fused
    assert left.reason == "in Block: its forward was replaced on the object"


def test_swap_norms_leaves_a_graph_module() -> None:
    net = torch.fx.symbolic_trace(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    (left,) = swap_norms(net, "l1", fuse="relu").not_fused
    assert "copies and pickles in a way of its own" in left.reason


def test_swap_norms_leaves_a_norm_that_is_the_model() -> None:
    (left,) = swap_norms(nn.BatchNorm2d(3), "l1", fuse="relu").not_fused
    assert left.reason == "no module calls it"


def test_class_attributes_are_watched_on_the_module() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.relu(self.norm(x)) if self.act else self.norm(x)

    net = type("Block", (nn.Module,), {"forward": forward, "act": True})()
    net.norm = nn.BatchNorm2d(3)
    assert len(swap_norms(net, "l1", fuse="relu").fused) == 1
    with pytest.warns(UserWarning, match="act of a Block was changed"):
        net.act = False
    assert (net(torch.randn(4, 3, 5, 5)) < 0).any()
