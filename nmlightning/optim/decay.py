"""Weight decay by rule: corrected for the learning rate, cautious, or by a schedule."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from torch import Tensor
from torch.optim import Optimizer

from nmlightning.errors import InputError, check_choice, check_positive, check_weight_decay
from nmlightning.optim.parameters import DECAY, STEP, OptimizedWeight, State, take_step
from nmlightning.optim.scope import MATRICES, Model
from nmlightning.optim.step_hooks import StepHookHandle, StepRule
from nmlightning.weights.channel_norms import ChannelLayout

Schedule = Callable[[int], float]
"""Of the steps that were taken before this one; in a config the path of a function."""


class CorrectedDecay(StepRule):
    """Decay scale-invariant weights in proportion to the learning rate, as AdamC does.

    With λ_t = λ · η_t / η_max for scale-invariant weights and λ_t = λ for all others, after every
    step from w to w + Δw

        w ← w + Δw − η_t λ_t w.

    In equilibrium ‖g‖ / ‖w‖ of a scale-invariant weight is proportional to √(λ_t / η_t): under
    plain decay it rises where the rate falls, late in a run. Which weights are scale-invariant is
    measured on their first gradients; until it is known a weight decays as the others.

    The rule takes λ itself, and the optimizer must not decay these weights, since a hook cannot
    take a decay out of the step. It acts beside the step, as in AdamW: SGD with momentum m that
    decays by λ inside the step does so 1 / (1 − m) times as fast. Attach it after
    `RadialProjection` and before a rule that holds or bounds norms. A weight without a gradient
    does not decay; a channel whose step is not finite goes back to where it was.

    Args:
        weight_decay: λ, or a function of the steps that were taken, `lambda step: …`, of which a
            resume only knows that it was one.
        max_lr: η_max; None for the largest rate so far, or that the schedule names before:
            `max_lr` of a parameter group, as of OneCycleLR, and `initial_lr`, as of all others.
        correct: which weights, the "scale_invariant" or "all", as the authors do but for the last
            layer, which then is to be in `exclude`.
        include: glob patterns on weight names; empty means every weight of two or more dimensions.
        exclude: glob patterns on names of weights that do not decay.

    Raises:
        InputError: a setting outside what is allowed. In `attach`: as `StepRule.attach` says, and
            for LBFGS.

    Source: Defazio 2025 (arXiv 2506.02285), algorithm 1.

    Examples:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.5)
        >>> rule = CorrectedDecay(0.1, max_lr=1.0)
        >>> handle = rule.attach(optimizer, [("weight", weight)])
        >>> weight.grad = torch.tensor([[8.0, -6.0]])  # across the weight: 0.5 · 0.1 · 0.5 / 1.0
        >>> optimizer.step()
        >>> weight.data
        tensor([[-1.0750,  6.9000]])
    """

    least_dims, acts_on, sorts, single_steps = MATRICES, DECAY, True, True

    def __init__(
        self,
        weight_decay: float | Schedule,
        max_lr: float | None = None,
        *,
        correct: Literal["scale_invariant", "all"] = "scale_invariant",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        if not callable(weight_decay):
            check_weight_decay(weight_decay)
        check_positive(max_lr=max_lr)
        check_choice("correct", correct, ("scale_invariant", "all"))
        super().__init__(include, exclude)
        self.weight_decay = weight_decay
        self.max_lr = max_lr
        self.correct = correct

    def init_state(self, weight: OptimizedWeight) -> State:
        """Return the number of steps, and the largest rate so far."""
        return {"step": 0, "max_lr": weight.learning_rate}

    def after_step(
        self, weight: OptimizedWeight, before: Tensor, recorded: Tensor | None, state: State
    ) -> tuple[Tensor, Tensor] | None:
        """Decay the weight by what it was before the step."""
        rate = weight.learning_rate
        named = [float(weight.group.get(name, 0.0)) for name in ("initial_lr", "max_lr")]
        state["max_lr"] = max(state["max_lr"], rate, *named)
        corrected = self.correct == "all" or state["scale_invariant"]
        share = rate / (self.max_lr or state["max_lr"]) if corrected and rate else 1.0
        decay = share * _lambda(self, self.weight_decay, state)
        return _decay(weight, before, decay, before, state)


class CautiousDecay(StepRule):
    """Decay only where the step moves an element towards zero, around any optimizer.

    For the step from w to w + Δw, whose update is u = −Δw / η, element by element

        w ← w + Δw − η λ · 1[u · w ≥ 0] · w,

    where u and w have the same sign just where Δw and w have opposite ones, or one of them is zero:
    decay never acts against what the optimizer does. u is the whole update with momentum and
    preconditioner, not the gradient. λ is taken by the rule, as by `CorrectedDecay`.

    Args:
        weight_decay: λ, or a function of the steps that were taken, `lambda step: …`, of which a
            resume only knows that it was one.
        include: glob patterns on weight names; empty means every weight of two or more dimensions.
        exclude: glob patterns on names of weights that do not decay.

    Raises:
        InputError: λ is negative. In `attach`: as `StepRule.attach` says; LBFGS.

    Source: Chen et al. 2025 (arXiv 2510.12402), equation 2.

    Examples:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([[1.0, -1.0]]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.5)
        >>> handle = CautiousDecay(0.1).attach(optimizer, [("weight", weight)])
        >>> weight.grad = torch.tensor([[0.2, 0.2]])  # towards zero, and away from it
        >>> optimizer.step()
        >>> weight.data
        tensor([[ 0.8500, -1.1000]])
    """

    least_dims, acts_on, single_steps = MATRICES, DECAY, True

    def __init__(
        self,
        weight_decay: float | Schedule,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        if not callable(weight_decay):
            check_weight_decay(weight_decay)
        super().__init__(include, exclude)
        self.weight_decay = weight_decay

    def init_state(self, weight: OptimizedWeight) -> State:
        """Return the number of steps."""
        _ = weight.learning_rate  # has it any?
        return {"step": 0}

    def after_step(
        self, weight: OptimizedWeight, before: Tensor, recorded: Tensor | None, state: State
    ) -> tuple[Tensor, Tensor] | None:
        """Decay the elements that the step moved towards zero, or not at all."""
        inwards = (weight.values - before) * before.sign() <= 0
        decay = _lambda(self, self.weight_decay, state)
        return _decay(weight, before * inwards, decay, before, state)


class DecaySchedule(StepRule):
    """Schedule the weight decay of an optimizer's own parameter groups, as LR schedulers the rate.

        λ_t = λ_0 · schedule(t),    t = 0, 1, 2, … the steps that were taken before,

    is written to `weight_decay` of the groups before each step; λ_0 is what is there at attach, and
    is put back by `remove`. Meanwhile the groups hold λ_0 as `initial_weight_decay`, which attach
    takes where it is there, so that a resume may load the optimizer before or after. It works for
    any decay that reads it: inside the step as of SGD, or beside it as of AdamW and Muon. Rules on
    steps and decays refuse weights that decay so, and `CorrectedDecay` and `CautiousDecay` take a
    schedule for their λ in its place.

    Args:
        schedule: a function of t, such as `lambda step: 0.5 ** (step / 1000)`; in a config the path
            of a function. A checkpoint does not hold it: two functions cannot be compared.
        include: glob patterns on weight names, empty means every weight of two or more dimensions:
            of their groups λ is scheduled, for all parameters in them.
        exclude: glob patterns on names of weights.

    Raises:
        InputError: in `attach`, the weights have no decay in their groups; as `StepRule.attach`
            says; LBFGS. In a step: the schedule is negative or not finite.

    Examples:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(1, 2))
        >>> optimizer = torch.optim.AdamW([weight], weight_decay=0.1)
        >>> handle = DecaySchedule(lambda step: 1 / (1 + step)).attach(optimizer, [("w", weight)])
        >>> for _ in range(2):
        ...     optimizer.step()
        >>> optimizer.param_groups[0]["weight_decay"]
        0.05
    """

    least_dims, acts_on, single_steps, decays, compares = MATRICES, STEP, True, True, False

    def __init__(
        self, schedule: Schedule, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
    ) -> None:
        if not callable(schedule):
            raise InputError(f"schedule is a function of the step, got {schedule!r}.")
        super().__init__(include, exclude)
        self.schedule = schedule

    def attach(
        self,
        optimizer: Optimizer,
        named_parameters: Model,
        layouts: Mapping[str, ChannelLayout] | None = None,
    ) -> StepHookHandle:
        """Schedule λ from now on, as `StepRule.attach` says."""
        handle = super().attach(optimizer, named_parameters, layouts)
        if not any(weight.group["initial_weight_decay"] for weight in handle.weights):
            handle.remove()
            raise InputError(
                "DecaySchedule multiplies the weight decay of parameter groups, and it is 0 in "
                "those of all weights: set weight_decay in the optimizer."
            )
        return handle

    def init_state(self, weight: OptimizedWeight) -> State:
        """Return λ_0, and the number of steps."""
        now = float(weight.group.get("weight_decay", 0.0))
        initial = weight.group.setdefault("initial_weight_decay", now)
        return {"step": 0, "weight_decay": initial}

    def before_step(self, weight: OptimizedWeight, state: State) -> None:
        share = _at_step(self, "schedule", self.schedule, state["step"])
        weight.group["weight_decay"] = state["weight_decay"] * share

    def after_step(
        self, weight: OptimizedWeight, before: Tensor, recorded: Tensor | None, state: State
    ) -> None:
        """Count the step."""
        state["step"] += 1

    def restore(self, weight: OptimizedWeight, state: State) -> None:
        weight.group["weight_decay"] = state["weight_decay"]
        weight.group.pop("initial_weight_decay", None)


def _lambda(rule: StepRule, weight_decay: float | Schedule, state: State) -> float:
    """Return λ of this step, and count it."""
    state["step"] += 1
    if not callable(weight_decay):
        return weight_decay
    return _at_step(rule, "weight_decay", weight_decay, state["step"] - 1)


def _at_step(rule: StepRule, name: str, schedule: Schedule, step: int) -> float:
    """Return what a function of the steps gives, or raise InputError in the name of the rule."""
    where = f"{type(rule).__name__}: {name} is a function of the step"
    try:
        value = float(schedule(step))
    except TypeError as error:  # as of one that takes no step, or that gives None
        raise InputError(f"{where} that gives a number; step {step}: {error}.") from error
    if not 0 <= value < math.inf:
        raise InputError(f"{where} that gives 0 or more, got {value} at step {step}.")
    return value


def _decay(
    weight: OptimizedWeight, decayed: Tensor, decay: float, before: Tensor, state: State
) -> tuple[Tensor, Tensor] | None:
    """Take η λ times `decayed` from the weight where its step is finite, and undo it elsewhere."""
    if not state["learns"]:
        return None
    skipped, factors = take_step(weight, before)
    amounts = (~skipped).to(weight.norms_dtype) * (weight.learning_rate * decay)
    weight.values.sub_(decayed * weight.spread(amounts))
    return skipped, factors
