"""NormSchedule: let the norms of the weights do what the learning-rate schedule would."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nmlightning.optim.families import Power
from nmlightning.optim.parameters import SteeredWeight, project, scale_step
from nmlightning.optim.reference import FollowingRule, Reference, check_positive, usable
from nmlightning.optim.step_hooks import StepRule
from nmlightning.weights.history import Alignment, Moment, NormHistory


class NormSchedule(FollowingRule):
    """Hold the learning rate of the weights constant, and schedule their norms instead.

    With ‖r_i‖ the recorded norm at the same moment, η₀ the constant rate, η_t that of the scheduler
    in place and q the optimizer's power (2 for SGD), after every step

        Δw_i ← Δw_i · η₀ / η_t,        then   w_i ← w_i / ‖w_i‖ · ‖r_i‖ · (η₀ / η_t)^(1/q)

    so that the effective learning rate η₀ / ‖w_i‖^q is η_t / ‖r_i‖^q, that of the recorded run. The
    optimizer's averages are scaled as the gradients of the scaled weight are. Where η_t is 0
    nothing moves.

    Args:
        reference: the recording of a run with weight decay: a `NormHistory`, its file, or the
            folder of the run.
        base_lr: η₀; by default the rate of the weight's parameter group before any schedule.
        max_rotation: the largest rotation per step, in radians; None for no bound, as in the paper.
            A channel that its recording let shrink to almost nothing then turns further at every
            step, and its momentum, which the projection scales up, overflows.
        power: q, 1 or 2; "auto" takes that of the optimizer's family.
        align: which record a moment has; see `NormHistory.place`.
        include: glob patterns on weight names; empty means every convolution that is
            scale-invariant in fact.
        exclude: glob patterns on weight names that are left alone.

    Raises:
        InputError: a setting outside what is allowed. In `attach`: as `Steering.attach` says.

    Source: Hoffer et al. 2018, §3 (arXiv 1803.01814).
    """

    def __init__(
        self,
        reference: NormHistory | str | Path,
        base_lr: float | None = None,
        *,
        max_rotation: float | None = 0.2,
        power: Power = "auto",
        align: Alignment = "interpolate",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        check_positive(base_lr=base_lr)
        super().__init__(
            reference,
            power=power,
            align=align,
            max_rotation=max_rotation,
            include=include,
            exclude=exclude,
        )
        self.base_lr = base_lr

    def _follow(self, weight: SteeredWeight, reference: Reference, power: int) -> StepRule:
        return _ScheduledWeight(weight, reference, self, power)

    def _settings(self, optimizer: Optimizer) -> dict[str, Any]:
        return {"base_lr": self.base_lr, **super()._settings(optimizer)}


class _ScheduledWeight:
    """The rule for one weight."""

    def __init__(
        self, weight: SteeredWeight, reference: Reference, settings: NormSchedule, power: int
    ) -> None:
        self.weight = weight
        self._reference = reference
        self._power = power
        self._max_rotation = settings.max_rotation
        initial = float(weight.group.get("initial_lr", weight.group["lr"]))
        self._base_lr = settings.base_lr or initial
        self.factors: Tensor | None = None

    def after_step(self, before: Tensor, moment: Moment) -> Tensor:
        norms = self._reference.norms(self.weight, moment)
        rate = self.weight.learning_rate
        if rate == 0:
            return torch.zeros_like(norms, dtype=torch.bool)
        share = self._base_lr / rate
        factors = torch.full_like(norms, share).where(usable(norms), 1.0)
        undone, self.factors = scale_step(self.weight, before, factors, self._max_rotation)
        project(self.weight, norms * share ** (1 / self._power))
        return undone

    def state_dict(self) -> dict[str, Any]:
        return {"base_lr": self._base_lr}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._base_lr = state["base_lr"]
