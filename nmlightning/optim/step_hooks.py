"""Hooks around an optimizer's step, by which a rule changes the step that was taken."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from nmlightning.errors import InputError, check_lists
from nmlightning.optim.nonfinite_steps import UndoneSteps
from nmlightning.optim.parameters import Model, SteeredWeight
from nmlightning.optim.scale_invariance import Scope, WholeScope
from nmlightning.optim.scope import CONVOLUTIONS, MATRICES, choose_weights
from nmlightning.weights.channel_norms import ChannelLayout
from nmlightning.weights.history import Moment, NormHistory


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


class Steering(ABC):
    """A rule: its settings, and `attach`.

    Args:
        include: glob patterns on the names of the weights to steer; empty means those of
            `least_dims` or more dimensions.
        exclude: glob patterns on names that are left alone.
    """

    least_dims: ClassVar[int] = CONVOLUTIONS

    def __init__(self, *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        check_lists(include=include, exclude=exclude)
        self.include = tuple(include)
        self.exclude = tuple(exclude)

    def attach(
        self,
        optimizer: Optimizer,
        named_parameters: Model,
        layouts: Mapping[str, ChannelLayout] | None = None,
    ) -> Attachment:
        """Steer every step of `optimizer` from now on.

        Args:
            optimizer: its weight decay must be 0 for what is steered.
            named_parameters: of the model, as `model.named_parameters()` gives them, or the model
                itself. Names alone do not tell a convolution from another parameter of three or
                more dimensions, nor a transposed one.
            layouts: the layouts of weights whose output channels are not along dimension 0; only
                names alone need them.

        Returns:
            The attachment, whose `remove` undoes it.

        Raises:
            InputError: no weight to steer; one that decays, or that is steered already; an
                optimizer that the rule is not for, or of which it is not known what norms do; a
                recording that cannot be read, or of another model.
        """
        history = self._open_reference()
        weights = choose_weights(
            optimizer,
            named_parameters,
            self.include,
            self.exclude,
            layouts,
            recorded=None if history is None else history.norms,
            least_dims=self.least_dims,
        )
        rules = self._make_rules(optimizer, weights, history)
        name, settings = type(self).__name__, self._settings(optimizer)
        return Attachment(optimizer, rules, self._make_scope(), name, settings)

    def _open_reference(self) -> NormHistory | None:
        """Return the recording that is followed, if any."""
        return None

    def _make_scope(self) -> Scope:
        """Return what decides which of the chosen weights are steered."""
        return Scope(insists=bool(self.include))

    @abstractmethod
    def _make_rules(
        self, optimizer: Optimizer, weights: Sequence[SteeredWeight], history: NormHistory | None
    ) -> Sequence[StepRule]:
        """Return what is done to each weight, or raise InputError for another optimizer."""

    @abstractmethod
    def _settings(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return what must stay as it is in a run that goes on from this one."""


class MatrixRule(Steering):
    """A rule for the weights of two or more dimensions.

    Args:
        include: glob patterns on weight names; empty means every such weight.
        exclude: glob patterns on weight names that are left alone.
    """

    least_dims = MATRICES

    def _make_rules(
        self, optimizer: Optimizer, weights: Sequence[SteeredWeight], history: NormHistory | None
    ) -> Sequence[StepRule]:
        if isinstance(optimizer, LBFGS):
            raise InputError(
                f"{type(self).__name__} works on single steps, and LBFGS takes several in one."
            )
        return [self._steer(weight) for weight in weights]

    def _make_scope(self) -> Scope:
        return WholeScope()

    def _settings(self, optimizer: Optimizer) -> dict[str, Any]:
        return {}

    @abstractmethod
    def _steer(self, weight: SteeredWeight) -> StepRule:
        """Return the rule for one weight."""
