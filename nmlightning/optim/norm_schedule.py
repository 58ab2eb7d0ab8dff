"""NormSchedule: let the norms of the weights do what the learning-rate schedule would."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from nmlightning.errors import check_positive
from nmlightning.optim import parameters
from nmlightning.optim.families import Power
from nmlightning.optim.step_hooks import StepRule
from nmlightning.weights.channel_norms import channel_norms, is_usable
from nmlightning.weights.history import Alignment, NormHistory


class NormSchedule(StepRule):
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
            scale-invariant by its gradients.
        exclude: glob patterns on names of weights that are not steered.

    Raises:
        InputError: a setting outside what is allowed. In `attach`: as `StepRule.attach` says.

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
        super().__init__(include, exclude)
        parameters.check_reference(reference, align, max_rotation)
        self.reference = reference
        self.base_lr = base_lr
        self.max_rotation = max_rotation
        self.power = power
        self.align = align

    def init_state(self, weight: parameters.OptimizedWeight) -> parameters.State:
        """Return η₀."""
        initial = float(weight.group.get("initial_lr", weight.learning_rate))
        return {"base_lr": self.base_lr or initial}

    def after_step(
        self,
        weight: parameters.OptimizedWeight,
        before: Tensor,
        recorded: Tensor | None,
        state: parameters.State,
    ) -> tuple[Tensor, Tensor] | None:
        """Take the step at the rate η₀, then set the norms."""
        rate = weight.learning_rate
        if rate == 0:
            return None
        assert recorded is not None, "there is a reference"
        share = state["base_lr"] / rate
        factors = torch.full_like(recorded, share).where(is_usable(recorded), 1.0)
        skipped, factors = parameters.scale_step(weight, before, factors, self.max_rotation)
        bounded = self.max_rotation is not None
        norms = channel_norms(before, layout=weight.layout) if bounded else None
        parameters.project(weight, recorded * share ** (1 / int(self.power)), norms)
        return skipped, factors
