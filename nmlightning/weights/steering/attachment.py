"""The hooks around an optimizer's step, and the count of what they could not steer."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from nmlightning.errors import InputError
from nmlightning.weights.steering.reference import Moment
from nmlightning.weights.steering.scale_invariance import Scope
from nmlightning.weights.steering.steered_weight import SteeredWeight

MAX_STEPS_UNDONE = 100
"""A run stops when some channel's step had to be undone in this many steps in a row."""
_LOOK_EVERY = 25  # Looking at the count waits for the device.


class StepRule(Protocol):
    """What is done to one weight after each step of its optimizer.

    Attributes:
        factors: (C,) what the last step of each channel was multiplied by; None before it.
    """

    weight: SteeredWeight
    factors: Tensor | None

    def after_step(self, before: Tensor, moment: Moment) -> Tensor:
        """Change the weight's step from `before`; return (C,) bool, the channels left unmoved."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""


class Attachment:
    """A rule at work on an optimizer; `remove` undoes it.

    Args:
        optimizer: its step hooks are used; nothing else of it changes.
        rules: one for each weight.
        scope: which of them are steered at all; it may drop weights after the first step.
        name: of the rule, for its messages.

    Attributes:
        steps: optimizer steps seen so far. A GradScaler that skips a step of an optimizer which is
            not fused hides it; whoever steps under one sets `clock`.
        undone_on_device: the count behind `undone`, which can be read without waiting for it.
        clock: returns the moment that a reference is looked up at; by default the number
            of steps before this one.
    """

    def __init__(
        self, optimizer: Optimizer, rules: Sequence[StepRule], scope: Scope, name: str
    ) -> None:
        self.rules = list(rules)
        self.scope = scope
        self.steps = 0
        self.clock: Callable[[], Moment] = lambda: {"step": self.steps - 1}
        self._name = name
        self._warned_of = 0
        self._optimizer = optimizer
        self._before: list[Tensor] = []
        self._is_first = True
        device = self.rules[0].weight.values.device
        self.undone_on_device = torch.zeros((), dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self.before_step()),
            optimizer.register_step_post_hook(lambda *_: self.after_step()),
        ]

    @property
    def undone(self) -> int:
        """How many steps of channels were undone since they, or their factor, were not finite."""
        return int(self.undone_on_device)

    @property
    def measured(self) -> bool:
        """Whether the scope knows all of its weights, which takes a gradient of each."""
        return all(self.scope.knows(rule.weight) for rule in self.rules)

    def measure(self) -> None:
        """Measure on the gradients as they are now which weights the loss feels the norm of.

        Otherwise the first step does. Call it before gradients are clipped by value: what is left
        of them points along the weights, too.
        """
        for rule in self.rules:
            self.scope.measure(rule.weight, rule.weight.values)

    def reasons(self) -> dict[str, str]:
        """Return for each weight why it is steered, or why it is not."""
        return {rule.weight.name: self.scope.reason(rule.weight.name) for rule in self.rules}

    def factors(self) -> dict[str, Tensor]:
        """Return for each weight that is steered the (C,) factors of its last step, on all ranks.

        Every rank has to call it.
        """
        return {
            rule.weight.name: rule.weight.all_channels(rule.factors)
            for rule in self.rules
            if rule.factors is not None
        }

    def remove(self) -> None:
        """Let the optimizer step as it did before."""
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs to go on bit for bit."""
        return {
            "steps": self.steps,
            "undone": self.undone_on_device.clone(),
            "in_a_row": self._in_a_row.clone(),
            "scope": self.scope.state_dict(),
            "weights": {rule.weight.name: rule.state_dict() for rule in self.rules},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, or raise InputError if it is of other weights."""
        names = [rule.weight.name for rule in self.rules]
        if set(state["weights"]) != set(names):
            other = sorted(set(state["weights"]) ^ set(names))
            raise InputError(f"The state of {self._name} is of other weights; {other[0]} differs.")
        self.steps = state["steps"]
        self.undone_on_device.copy_(state["undone"])
        self._warned_of = self.undone
        self._in_a_row.copy_(state["in_a_row"])
        self.scope.load_state_dict(state["scope"])
        for rule in self.rules:
            rule.load_state_dict(state["weights"][rule.weight.name])

    def before_step(self) -> None:
        """Keep the weights; the optimizer calls it."""
        self._before = [rule.weight.values.clone() for rule in self.rules]
        self._is_first = not self._optimizer.state

    @torch.no_grad()
    def after_step(self) -> None:
        """Steer the step that led away from them; the optimizer calls it."""
        self.steps += 1
        if self._skipped():
            if self._is_first:  # torch's fused SGD leaves uninitialised momentum behind
                self._optimizer.state.clear()
            return
        moment = self.clock()
        undone = torch.zeros_like(self.undone_on_device)
        for rule, before in zip(self.rules, self._before, strict=True):
            self.scope.measure(rule.weight, before)
            if self.scope.holds(rule.weight):
                undone += rule.after_step(before, moment).sum().to(undone.device)
        self._before = []
        self._count(undone)

    def _skipped(self) -> bool:
        """Whether a fused optimizer under a GradScaler has left this step out: it overflowed."""
        found = getattr(self._optimizer, "found_inf", None)
        return found is not None and bool(found)

    def _count(self, undone: Tensor) -> None:
        self.undone_on_device += undone
        self._in_a_row = (self._in_a_row + 1) * (undone > 0)
        if self.steps % _LOOK_EVERY == 0:
            self._look(int(undone))

    def _look(self, now: int) -> None:
        if int(self._in_a_row) >= MAX_STEPS_UNDONE:
            raise InputError(
                f"{self._name} had to undo steps of some channels {int(self._in_a_row)} times in a "
                f"row (now {now} channels), since they or their factors were not finite: "
                "the run has diverged. Lower the learning rate, or follow a finer recording "
                '(every few steps, align="interpolate").'
            )
        if self.undone > self._warned_of:
            warnings.warn(
                f"{self._name} undid {self.undone - self._warned_of} steps of channels by step "
                f"{self.steps}, since they or their factors were not finite; after "
                f"{MAX_STEPS_UNDONE} such steps in a row the run stops.",
                stacklevel=2,
            )
            self._warned_of = self.undone
