"""The hooks around an optimizer's step, by which a rule is at work on it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from nmlightning.errors import InputError
from nmlightning.weights.steering.reference import Moment
from nmlightning.weights.steering.scale_invariance import Scope
from nmlightning.weights.steering.steered_weight import SteeredWeight
from nmlightning.weights.steering.undone_steps import UndoneSteps


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
        """Return what a resumed run needs, of all ranks' channels; every rank has to call it."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""


class Attachment:
    """A rule at work on an optimizer; `remove` undoes it.

    Args:
        optimizer: its step hooks are used; nothing else of it changes.
        rules: one for each weight.
        scope: which of them are steered at all; it may drop weights after the first steps.
        name: of the rule, for its messages.
        settings: what of the rule must stay as it is in a run that goes on from this one.

    Raises:
        InputError: the optimizer's steps of one of the weights are steered by a rule already.

    Attributes:
        name: of the rule.
        steps: optimizer steps seen so far. A GradScaler that skips a step of an optimizer which is
            not fused hides it; whoever steps under one sets `clock`.
        clock: returns the moment that a reference is looked up at; by default the number
            of steps before this one.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rules: Sequence[StepRule],
        scope: Scope,
        name: str,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        _take(optimizer, rules, name)
        self.rules = list(rules)
        self.scope = scope
        self.steps = 0
        self.clock: Callable[[], Moment] = lambda: {"step": self.steps - 1}
        self.name = name
        self._settings = dict(settings or {})
        self._optimizer = optimizer
        self._before: list[Tensor] = []
        self._is_first = True
        self._undone = UndoneSteps([rule.weight for rule in self.rules], name)
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self.before_step()),
            optimizer.register_step_post_hook(lambda *_: self.after_step()),
        ]

    @property
    def undone(self) -> int:
        """How many steps of channels were undone since they, or their factor, were not finite.

        It is that of all ranks, and every rank has to ask for it.
        """
        return int(self.undone_on_device)

    @property
    def undone_on_device(self) -> Tensor:
        """The count behind `undone`, without waiting for the device."""
        return self._undone.totals().sum()

    @property
    def measured(self) -> bool:
        """Whether the scope knows all of its weights, which takes gradients of each."""
        return all(self.scope.decided(rule.weight.name) for rule in self.rules)

    def measure(self) -> None:
        """Measure on the gradients as they are now which weights the loss feels the norm of.

        Otherwise the step does. Call it before gradients are clipped by value: what is left
        of them points along the weights, too.
        """
        for rule in self.rules:
            self.scope.measure(rule.weight, rule.weight.values)

    def reasons(self) -> dict[str, str]:
        """Return for each weight why it is steered, or why it is not."""
        return {rule.weight.name: self.scope.reason(rule.weight.name) for rule in self.rules}

    @property
    def steered(self) -> list[str]:
        """The names of the weights that are steered now."""
        return [rule.weight.name for rule in self.rules if self.scope.holds(rule.weight)]

    def factors(self) -> dict[str, Tensor]:
        """Return for each weight that is steered the (C,) factors of its last step, on all ranks.

        Every rank has to call it.
        """
        return {
            rule.weight.name: rule.weight.all_channels(rule.factors)
            for rule in self.rules
            if rule.factors is not None
        }

    def look(self) -> None:
        """Warn of steps that were undone now, not at the next 25th step.

        Every rank has to call it.

        Raises:
            InputError: steps were undone for too many steps in a row.
        """
        self._undone.look(self.steps)

    def remove(self) -> None:
        """Let the optimizer step as it did before."""
        for hook in self._hooks:
            hook.remove()
        for rule in self.rules:
            _steered(self._optimizer).pop(rule.weight.parameter, None)
        self._undone.look_here(self.steps)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs to go on bit for bit; every rank has to call it."""
        return {
            "rule": self.name,
            "settings": self._settings,
            "steps": self.steps,
            "undone": self._undone.state_dict(),
            "scope": self.scope.state_dict(),
            "weights": {rule.weight.name: rule.state_dict() for rule in self.rules},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            InputError: it is of another rule, of other settings, or of other weights.
        """
        self._check_rule(state)
        names = [rule.weight.name for rule in self.rules]
        if set(state["weights"]) != set(names):
            other = sorted(set(state["weights"]) ^ set(names))
            raise InputError(f"The state of {self.name} is of other weights; {other[0]} differs.")
        self.steps = state["steps"]
        self._undone.load_state_dict(state["undone"])
        self.scope.load_state_dict(state["scope"])
        for rule in self.rules:
            rule.load_state_dict(state["weights"][rule.weight.name])

    def _check_rule(self, state: Mapping[str, Any]) -> None:
        there, here = f"by {state['rule']}", f"by {self.name}"
        if there == here:
            others = [
                key for key, value in self._settings.items() if state["settings"][key] != value
            ]
            if not others:
                return
            there += f" with {others[0]}={state['settings'][others[0]]!r}"
            here = f"with {others[0]}={self._settings[others[0]]!r}"
        raise InputError(
            f"The checkpoint was steered {there}, and this run is {here}: go on with the same, or "
            "start from the weights alone."
        )

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
        undone = [
            self._steer(rule, before, moment)
            for rule, before in zip(self.rules, self._before, strict=True)
        ]
        self._before = []
        self._undone.note(undone, self.steps)

    def _steer(self, rule: StepRule, before: Tensor, moment: Moment) -> Tensor | None:
        """Return (C,) bool, the channels whose step was undone; None for a weight that is left."""
        self.scope.take(rule.weight, before)
        if not self.scope.holds(rule.weight):
            return None
        undone = rule.after_step(before, moment)
        rule.weight.forget(undone)
        return undone

    def _skipped(self) -> bool:
        """Whether a fused optimizer under a GradScaler has left this step out: it overflowed."""
        found = getattr(self._optimizer, "found_inf", None)
        return found is not None and bool(found)


def _take(optimizer: Optimizer, rules: Sequence[StepRule], name: str) -> None:
    """Note on the optimizer whose steps are steered, and by what."""
    steered = _steered(optimizer)
    for rule in rules:
        if rule.weight.parameter in steered:
            raise InputError(
                f"{rule.weight.name} is steered by {steered[rule.weight.parameter]} already: "
                f"remove that, or exclude the weight from it or from {name}."
            )
    steered.update((rule.weight.parameter, name) for rule in rules)


def _steered(optimizer: Optimizer) -> dict[Tensor, str]:
    """Return the names of the rules that steer an optimizer's parameters."""
    notes: dict[Tensor, str] = optimizer.__dict__.setdefault("_nmlightning_steered", {})
    return notes
