"""Hooks around an optimizer's step, by which a rule changes the step that was taken."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from nmlightning.errors import InputError, check_lists, repr_by_arguments
from nmlightning.optim.families import Power, StepHooks, choose_power, find_steps
from nmlightning.optim.nonfinite_steps import NonfiniteSteps
from nmlightning.optim.parameters import (
    NORM,
    OptimizedWeight,
    RecordedNorms,
    State,
    claim_weights,
    gather_state,
    scatter_state,
)
from nmlightning.optim.scope import CONVOLUTIONS, Choice, Model, Scope, choose_weights, scope_text
from nmlightning.weights.channel_norms import ChannelLayout
from nmlightning.weights.history import Alignment, Moment, NormHistory, RecordPlace

StepCall = tuple[tuple[Any, ...], dict[str, Any]]
_OF_WEIGHTS = ("reference", "include", "exclude", "within")


class StepRule(ABC):
    """The interface of a rule: its settings, and what it does to a weight after each step.

    All attributes of an instance but `reference`, `include` and `exclude` are plain values, which
    a resumed run must have, too, or functions, of which it may have others, since two of them
    cannot be compared.

    What was attached first acts first. A rule that changes the step comes before one that decays,
    and that before one that sets or bounds the norm; of each kind a weight has one.

    Attributes:
        acts_on: STEP, DECAY or NORM, its kind in this order.
        decays: whether the optimizer may decay the weights, as where the rule only sets what the
            step led to; otherwise it must not.
        sorts: whether it steers scale-invariant weights and others alike; `after_step` then finds
            in the state whether the weight is `scale_invariant`.
        single_steps: whether it refuses LBFGS, which takes several in one.
        compares: whether `after_step` needs the values from before.
        include: glob patterns on the names of the weights to steer; empty means those of
            `least_dims` or more dimensions.
        exclude: glob patterns on names that are left alone.
        within: a tracker's patterns to include and to exclude; empty where the rule includes.
        least_dims: CONVOLUTIONS, of which the scale-invariant ones are steered, or
            MATRICES, which are all.
        reference: a recording to follow, its file, or the folder of the run that made it.
        power: with a reference, 1 or 2; "auto" takes that of the optimizer's family.
        align: with a reference, which record a moment has; see `NormHistory.place`.
    """

    include: tuple[str, ...]
    exclude: tuple[str, ...]
    least_dims: ClassVar[int] = CONVOLUTIONS
    acts_on: ClassVar[int] = NORM
    decays: ClassVar[bool] = False
    sorts: ClassVar[bool] = False
    single_steps: ClassVar[bool] = False
    compares: ClassVar[bool] = True
    within: tuple[Sequence[str], Sequence[str]] = ((), ())
    reference: NormHistory | str | Path | None = None
    power: Power | int
    align: Alignment

    def __init__(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        check_lists(include=include, exclude=exclude)
        self.include = tuple(include)
        self.exclude = tuple(exclude)

    __repr__ = repr_by_arguments

    @property
    def choice(self) -> Choice:
        """The weights to steer, by name and shape."""
        return Choice(self.include, self.exclude, self.least_dims, self.within, self.decays)

    @abstractmethod
    def init_state(self, weight: OptimizedWeight) -> State:
        """Return what is kept of a weight, or raise InputError for another optimizer."""

    def before_step(self, weight: OptimizedWeight, state: State) -> None:
        """Do what a step must find done."""
        return

    def restore(self, weight: OptimizedWeight, state: State) -> None:
        """Undo, where the rule is removed, what would outlive it."""
        return

    def measure_gradient(self, weight: OptimizedWeight) -> State:
        """Return what `after_step` finds in the state of the gradient, which a step may drop."""
        return {"learns": weight.gradient is not None}

    @abstractmethod
    def after_step(
        self, weight: OptimizedWeight, before: Tensor, recorded: Tensor | None, state: State
    ) -> tuple[Tensor, Tensor] | None:
        """Change the step that led from `before` to the weight, and its state, in place.

        Args:
            weight: the weight after the step.
            before: its values before.
            recorded: (C,) recorded norms at this moment; None without a reference.
            state: of the weight.

        Returns:
            (C,) bool, the channels whose step was skipped, and (C,) what the step of each channel
            was multiplied by; None where the step does not change.
        """

    def attach(
        self,
        optimizer: Optimizer,
        named_parameters: Model,
        layouts: Mapping[str, ChannelLayout] | None = None,
    ) -> "StepHookHandle":
        """Change every step of `optimizer` from now on; later changes of settings have no effect.

        Args:
            optimizer: its weight decay must be 0 for steered weights, unless the rule says that it
                need not. It may wrap another.
            named_parameters: of the model, as `model.named_parameters()` gives them, or the model
                itself. From names alone a convolution is not known from another parameter of three
                or more dimensions, nor a transposed one.
            layouts: the layouts of weights whose output channels are not along dimension 0; only
                names alone need them.

        Returns:
            The handle, whose `remove` detaches the rule.

        Raises:
            InputError: no weight to steer; one that decays, or that is steered already; an
                optimizer that the rule is not for, or of which it is not known what norms do; one
                that calls no step hooks; a recording that cannot be read, or of another model.
        """
        steps = find_steps(optimizer, in_place=self.compares)
        optimizer, given = steps[-1], self.reference
        history = given if isinstance(given, NormHistory | None) else NormHistory.load(given)
        recorded_names = None if history is None else history.norms
        weights = choose_weights(optimizer, named_parameters, self.choice, layouts, recorded_names)
        rule, recorded = copy.copy(self), None
        if history is not None:
            rule.power = choose_power(optimizer, self.power)
            recorded = RecordedNorms(history, weights, self.align)
        if self.single_steps and isinstance(optimizer, LBFGS):
            name = type(self).__name__
            raise InputError(f"{name} works on single steps, and LBFGS takes several in one.")
        return StepHookHandle(steps, rule, weights, recorded)


class StepHookHandle:
    """A rule attached to the step hooks of nested optimizers, outermost first; see `StepHooks`.

    Attributes:
        name: of the rule.
        weights: what may be steered.
        scope: which of them are steered at all; it may drop weights after the first steps.
        steps: optimizer steps seen so far. A GradScaler that skips a step of an optimizer which is
            not fused hides it; whoever steps under one sets `clock`.
        clock: returns the moment that a reference is looked up at; by default the number
            of steps before this one.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        rule: StepRule,
        weights: Sequence[OptimizedWeight],
        recorded: RecordedNorms | None = None,
    ) -> None:
        optimizer = optimizers[-1]
        self.name = type(rule).__name__
        self.weights = list(weights)
        self._states = {weight.name: rule.init_state(weight) for weight in weights}
        claim_weights(weights, self.name, rule.acts_on)
        measures = rule.sorts or rule.least_dims == CONVOLUTIONS
        self.scope = Scope(insists=bool(rule.include), measures=measures, sorts=rule.sorts)
        self.steps = 0
        self.clock: Callable[[], Moment] = lambda: {"step": self.steps - 1}
        self._optimizer, self._rule, self._recorded = optimizer, rule, recorded
        self._factors: dict[str, Tensor] = {}
        self._before: list[Tensor] = []
        self._of_gradients: list[State] = []
        self._is_first = True
        self._skipped = NonfiniteSteps(weights, self.name)
        self._hooks = StepHooks(optimizers, self.before_step, self.after_step)

    @property
    def skipped(self) -> int:
        """The channels' steps that were skipped, on all ranks, each of which has to ask for it."""
        return int(self.skipped_on_device)

    undone = skipped  # its former name

    @property
    def skipped_on_device(self) -> Tensor:
        """The count behind `skipped`, without waiting for the device."""
        return self._skipped.totals().sum()

    @property
    def measured(self) -> bool:
        """True once the scope knows all of its weights, which takes gradients of each."""
        return all(self.scope.decided(weight.name) for weight in self.weights)

    def measure(self) -> None:
        """Measure on the current gradients on which weights' norms the loss depends.

        Otherwise the step measures. Call it before you clip gradients by value, which bends them
        towards the weights.
        """
        for weight in self.weights:
            self.scope.measure(weight)

    def __repr__(self) -> str:
        return scope_text(self.name, self.reasons())

    def reasons(self) -> dict[str, str]:
        """Return for each weight why it is steered, or why it is not."""
        return {weight.name: self.scope.reason(weight.name) for weight in self.weights}

    @property
    def steered(self) -> list[str]:
        """The names of the weights that are steered now."""
        return [weight.name for weight in self.weights if self.scope.holds(weight)]

    def factors(self) -> dict[str, Tensor]:
        """Return (C,) the factors of the last step of each weight; every rank has to call it."""
        return {
            weight.name: weight.all_channels(self._factors[weight.name])
            for weight in self.weights
            if weight.name in self._factors
        }

    def warn_if_skipped(self) -> None:
        """Warn now of steps that were skipped, or stop; every rank has to call it."""
        self._skipped.warn_if_skipped(self.steps)

    def remove(self) -> None:
        """Let the optimizer step as it did before."""
        for weight in self.weights if self._hooks.remove() else ():
            self._rule.restore(weight, self._states[weight.name])
            del weight.rules[self._rule.acts_on]
        self._skipped.warn_on_this_rank(self.steps)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run needs to resume bit for bit; every rank has to call it."""
        return {
            "rule": self.name,
            "settings": self._settings(),
            "steps": self.steps,
            "undone": self._skipped.state_dict(),
            "scope": self.scope.state_dict(),
            "weights": {w.name: gather_state(w, self._states[w.name]) for w in self.weights},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a `state_dict`.

        Raises:
            InputError: it is of another rule, of other settings, or of other weights.
        """
        self._check_rule(state)
        if set(state["weights"]) != set(self._states):
            other = sorted(set(state["weights"]) ^ set(self._states))
            raise InputError(f"The state of {self.name} is for other weights; {other[0]} differs.")
        self.steps = state["steps"]
        self._skipped.load_state_dict(state["undone"])
        self.scope.load_state_dict(state["scope"])
        for weight in self.weights:
            scatter_state(weight, state["weights"][weight.name], self._states[weight.name])

    def _settings(self) -> dict[str, Any]:
        """Return what of the rule must stay as it is in a run that resumes this one."""
        settings = vars(self._rule).items()
        own = {k: v for k, v in settings if k not in _OF_WEIGHTS}
        return {k: "a function" if callable(v) else v for k, v in own.items()}

    def _check_rule(self, state: Mapping[str, Any]) -> None:
        there, here = f"by {state['rule']}", f"by {self.name}"
        if there == here:
            known = state["settings"]
            others = {k: v for k, v in self._settings().items() if known.get(k, v) != v}
            if not others:
                return
            name, value = next(iter(others.items()))
            there, here = f"{there} with {name}={known[name]!r}", f"with {name}={value!r}"
        raise InputError(
            f"The checkpoint was steered {there}, and this run is {here}: resume with the same, or "
            "start from the weights alone."
        )

    def before_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepCall | None:
        """Keep the weights, and measure the gradients, which a closure makes within the step."""
        for weight in self.weights:
            self._rule.before_step(weight, self._states[weight.name])
        values = [weight.values for weight in self.weights]
        self._before = [each.clone() for each in values] if self._rule.compares else values
        self._of_gradients = [{} for _ in self.weights]
        self._is_first = not self._optimizer.state
        return call_before_step(self._measure_step, args, kwargs)

    @torch.no_grad()
    def _measure_step(self) -> None:
        for weight in self.weights:
            self.scope.measure(weight, again=False)
        self._of_gradients = [self._rule.measure_gradient(weight) for weight in self.weights]

    @torch.no_grad()
    def after_step(self) -> None:
        """Apply the rule to the step that led away from them; the optimizer calls it."""
        self.steps += 1
        found_inf = getattr(self._optimizer, "found_inf", None)  # of a fused one under a GradScaler
        if found_inf is not None and bool(found_inf):
            if self._is_first:  # torch's fused SGD leaves uninitialised momentum behind
                self._optimizer.state.clear()
            self.scope.forget()
            self._before = []
            return
        moment = self.clock()
        for weight in self.weights:
            self.scope.take(weight)
        held = [self.scope.holds(weight) for weight in self.weights]
        follows = self._recorded is not None and any(held)
        place = self._recorded.place(moment) if self._recorded and follows else None
        skipped = [
            self._apply(number, place) if is_held else None for number, is_held in enumerate(held)
        ]
        self._before, self._of_gradients = [], []
        self._skipped.note(skipped, self.steps)

    def _apply(self, number: int, place: RecordPlace | None) -> Tensor | None:
        """Return (C,) bool, the channels whose step was skipped; None is none."""
        weight, before = self.weights[number], self._before[number]
        recorded = self._recorded.norms(weight, place) if self._recorded and place else None
        state, of_gradient = self._states[weight.name], self._of_gradients[number]
        if self._rule.sorts:
            of_gradient["scale_invariant"] = self.scope.passes(weight.name)
        state.update(of_gradient)
        applied = self._rule.after_step(weight, before, recorded, state)
        for key in of_gradient:
            del state[key]
        if applied is None:
            return None
        skipped, self._factors[weight.name] = applied
        weight.reset_nonfinite_state(skipped)
        return skipped


def call_before_step(
    action: Callable[[], None], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> StepCall | None:
    """Call `action` before a step moves anything: now, or after the closure that it is given.

    Returns what a hook before the step returns for its closure to be another, else None.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):
        action()
        return None

    def call_both() -> Any:
        loss = closure()
        action()
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": call_both}
    return (args[0], call_both, *args[2:]), kwargs
