"""Rules on optimizers that wrap others: the one that steps is found, or refused by name."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import nn
from torch.optim import SGD, Optimizer

from nmlightning.errors import InputError
from nmlightning.optim import DecaySchedule, Hyperball, LRCorrection
from nmlightning.weights.channel_norms import channel_norms
from optim_rules import CONVOLUTIONS, find_loss, make_net, random_history


class PassingOn(Optimizer):
    """A wrapper without hooks, as accelerate's: it leaves out what `Optimizer.__init__` does."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        self.zero_grad = optimizer.zero_grad  # type: ignore[method-assign]

    def step(self, closure: Any = None) -> None:
        self.optimizer.step()


class Gathering(PassingOn):
    """It has hooks, and steps in every second call only."""

    def __init__(self, optimizer: Optimizer) -> None:
        Optimizer.__init__(self, optimizer.param_groups, {})
        super().__init__(optimizer)
        self.calls = 0

    def step(self, closure: Any = None) -> None:
        self.calls += 1
        if self.calls % 2 == 0:
            self.optimizer.step()


class Lookahead(PassingOn):
    """As timm's it has dicts of hooks that nothing calls; it moves the weights after a step."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self._optimizer_step_pre_hooks: Any = OrderedDict()
        self._optimizer_step_post_hooks: Any = OrderedDict()
        self.slow = [q.detach().clone() for group in self.param_groups for q in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for q, slow in zip(self.param_groups[0]["params"], self.slow, strict=True):
            q.copy_(slow.lerp_(q, 0.5))


class SAM(Gathering):
    """Sharpness-aware minimization in two steps, or in one by a closure."""

    @torch.no_grad()
    def first_step(self) -> None:
        for q in self.param_groups[0]["params"]:
            self.state[q]["old"] = q.clone()
            q.add_(q.grad, alpha=0.05)

    @torch.no_grad()
    def second_step(self) -> None:
        for q in self.param_groups[0]["params"]:
            q.copy_(self.state[q].pop("old"))
        self.optimizer.step()

    def step(self, closure: Any = None) -> None:
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class Decoupled(SAM):
    """As WSAM it moves the weights after the step of the optimizer in it, too."""

    @torch.no_grad()
    def second_step(self) -> None:
        super().second_step()
        for q in self.param_groups[0]["params"]:
            q.sub_(q.grad, alpha=0.02)


class Alone(SAM):
    """As bSAM it steps without another optimizer, and in three parts."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self.taken = optimizer.step
        del self.optimizer

    @torch.no_grad()
    def second_step(self) -> None:
        for q in self.param_groups[0]["params"]:
            q.sub_(q.grad, alpha=0.1)

    @torch.no_grad()
    def third_step(self) -> None:
        for q in self.param_groups[0]["params"]:
            q.copy_(self.state[q].pop("old"))
        self.taken()

    def step(self, closure: Any = None) -> None:
        self.first_step()
        for part in (self.second_step, self.third_step):
            with torch.enable_grad():
                closure()
            part()


class NoOptimizer:
    """As schedulefree's wrappers, which step with copies of the weights."""

    def __init__(self, base: Optimizer) -> None:
        self.base, self.state, self.zero_grad = base, base.state, base.zero_grad

    @property
    def param_groups(self) -> Any:
        return self.base.param_groups

    def step(self) -> None:
        self.base.step()


class ScheduleFreeWrapper(NoOptimizer):
    __module__ = "schedulefree.wrap_schedulefree"


class ScheduleFree(Gathering):
    """As schedulefree's optimizers, whose parameters are a mix of what steps and of its average."""

    def train(self) -> None:
        """Would put the mix in place."""

    def eval(self) -> None:
        """Would put the average in place."""


class Split(PassingOn):
    """As torchao's CPUOffloadOptimizer, with an optimizer for each weight."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        groups = [{"params": [q]} for q in self.param_groups[0]["params"]]
        self.optimizer = {group["params"][0]: SGD([group], lr=0.1) for group in groups}  # type: ignore[assignment]


class Fused(PassingOn):
    """As LOMO."""

    def fused_backward(self, loss: torch.Tensor, lr: float) -> None:
        """Would step."""


class Copies(PassingOn):
    """As SafeFP16Optimizer of pytorch_optimizer, it steps with copies in float32."""

    def __init__(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            group["params"] = [nn.Parameter(q.detach().float()) for q in group["params"]]
        super().__init__(optimizer)


def norms(net: nn.Module) -> torch.Tensor:
    return torch.stack([net.get_parameter(name).detach().norm() for name in CONVOLUTIONS])


def train(net: nn.Module, optimizer: Any, steps: int, first: int = 0) -> None:
    """Step as SAM does by two methods, or by a closure, where there is one, or plainly."""
    for step in range(first, first + steps):
        optimizer.zero_grad()
        find_loss(net, step).backward()
        if isinstance(optimizer, SAM) and step % 2:
            optimizer.first_step()
            optimizer.zero_grad()
            find_loss(net, step).backward()
            optimizer.second_step()
            if isinstance(optimizer, Alone):
                optimizer.third_step()
        elif isinstance(optimizer, SAM):
            optimizer.step(lambda step=step: find_loss(net, step).backward())
        else:
            optimizer.step()


WRAPPERS: list[Callable[[Optimizer], Any]] = [
    PassingOn,
    Gathering,
    Lookahead,
    SAM,
    Decoupled,
    LightningOptimizer,
    lambda optimizer: PassingOn(SAM(optimizer)).optimizer,
    lambda optimizer: PassingOn(Lookahead(PassingOn(optimizer))),
]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_rule_holds_norms_of_wrapped_optimizer(wrap: Callable[[Optimizer], Any]) -> None:
    net = make_net()
    inner = SGD(net.parameters(), lr=0.5, momentum=0.9)
    optimizer = wrap(inner)
    before, handle = norms(net), Hyperball().attach(optimizer, net)
    train(net, inner if isinstance(optimizer, LightningOptimizer) else optimizer, 6)
    torch.testing.assert_close(norms(net), before)
    assert handle.steps == (3 if type(optimizer) is Gathering else 6)
    with pytest.raises(InputError, match="is steered by Hyperball already"):
        Hyperball().attach(inner, net)
    handle.remove()
    train(net, inner, 3)
    assert not torch.allclose(norms(net), before)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (NoOptimizer, "NoOptimizer is not: attach it to the SGD in it"),
        (
            ScheduleFreeWrapper,
            r"is not: its eval\(\) puts averages in place of the weights, .*; take",
        ),
        (
            ScheduleFree,
            r"ScheduleFree is no optimizer for this rule: its eval\(\) puts averages in",
        ),
        (lambda inner: PassingOn(ScheduleFree(inner)), "ScheduleFree is no optimizer for this"),
        (lambda inner: PassingOn(NoOptimizer(inner)), "PassingOn is not: .* NoOptimizer in it"),
        (Split, r"Split steps with 8 optimizers \(SGD\): attach a rule to each"),
        (lambda inner: "sgd", "which str is not"),
        (Fused, "Fused moves the weights in fused_backward, with no step"),
        (Copies, "SGD that steps has none of these parameters: it has copies of them"),
    ],
)
def test_wrapper_without_hooks_is_refused_by_name(wrap: Any, message: str) -> None:
    net = make_net()
    with pytest.raises(InputError, match=message):
        Hyperball().attach(wrap(SGD(net.parameters(), lr=0.1)), net)


@pytest.mark.parametrize("wrap", [SAM, Decoupled, Alone])
@pytest.mark.parametrize("first", [0, 1], ids=["by a closure", "by parts"])
def test_step_in_parts_is_measured_where_it_begins(wrap: Any, first: int) -> None:
    """Between them the weights stand elsewhere, and gradients point along where they stood."""
    net = make_net()
    optimizer = wrap(SGD(net.parameters(), lr=0.1, momentum=0.9))
    before = [channel_norms(net.get_parameter(name)) for name in CONVOLUTIONS]
    handle = LRCorrection(random_history(net), power=2).attach(optimizer, net)
    again = Hyperball(include=["head.weight"]).attach(optimizer, net)
    for step in range(first, 8, 2):
        train(net, optimizer, 1, step)
    assert handle.steps == again.steps == 4
    assert all(share < 1e-10 for share in handle.scope.shares.values())
    after = [channel_norms(net.get_parameter(name)) for name in CONVOLUTIONS]
    torch.testing.assert_close(after, before)
    handle.remove()
    again.remove()
    train(net, optimizer, 1, first)
    assert handle.steps == again.steps == 4


@pytest.mark.parametrize("uses_base", [False, True], ids=["first", "after one of its base"])
def test_step_of_subclass_is_seen_once_and_whole(uses_base: bool) -> None:
    """Its base calls the hooks, too, once an object of that was made; an error ends a step."""

    class Base(SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    class Longer(Base):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            for q in self.param_groups[0]["params"]:
                q.mul_(1.1)
            if self.state.pop("fails", False):
                raise RuntimeError
            return loss

    net = make_net()
    if uses_base:
        Base([torch.ones(1)])
    optimizer = Longer(net.parameters(), lr=0.5)
    before, handle = norms(net), Hyperball().attach(optimizer, net)
    train(net, optimizer, 2)
    optimizer.state["fails"] = True  # type: ignore[index]
    with pytest.raises(RuntimeError):
        train(net, optimizer, 1)
    train(net, optimizer, 2)
    torch.testing.assert_close(norms(net), before)
    assert handle.steps == 4


def test_decay_schedule_is_for_schedule_free_optimizers_too() -> None:
    net = make_net()
    optimizer = ScheduleFree(SGD(net.parameters(), lr=0.1, weight_decay=0.5))
    DecaySchedule(lambda step: 1 / (1 + step)).attach(optimizer, net)
    train(net, optimizer, 4)
    assert optimizer.param_groups[0]["weight_decay"] == 0.25  # it steps in every second call


def test_power_is_that_of_the_wrapped_optimizer() -> None:
    net = make_net()
    handle = LRCorrection(random_history(net)).attach(PassingOn(SGD(net.parameters(), lr=0.1)), net)
    assert handle.state_dict()["settings"]["power"] == 2
