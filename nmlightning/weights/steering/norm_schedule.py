"""NormSchedule: let the norms of the weights do what the learning-rate schedule would."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from nmlightning.errors import check_choice
from nmlightning.name_patterns import check_lists
from nmlightning.weights.channel_norms import ChannelLayout
from nmlightning.weights.history import Alignment, NormHistory
from nmlightning.weights.optimizer_family import Power, choose_power
from nmlightning.weights.steering.attachment import Attachment
from nmlightning.weights.steering.choose_weights import choose_weights
from nmlightning.weights.steering.moves import project, scale_step
from nmlightning.weights.steering.named_weights import Model
from nmlightning.weights.steering.reference import Moment, Reference, open_history, usable
from nmlightning.weights.steering.rule_settings import check_positive, check_reference
from nmlightning.weights.steering.scale_invariance import Scope
from nmlightning.weights.steering.steered_weight import SteeredWeight
from nmlightning.weights.steering.steering import Steering


class NormSchedule(Steering):
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
        InputError: a setting outside what is allowed. In `attach`: see there.

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
        check_choice("align", align, get_args(Alignment))
        check_reference(reference)
        check_positive(base_lr=base_lr, max_rotation=max_rotation)
        check_lists(include=include, exclude=exclude)
        self.reference = reference
        self.base_lr = base_lr
        self.max_rotation = max_rotation
        self.power = power
        self.align = align
        self.include = tuple(include)
        self.exclude = tuple(exclude)

    def attach(
        self,
        optimizer: Optimizer,
        named_parameters: Model,
        layouts: Mapping[str, ChannelLayout] | None = None,
    ) -> Attachment:
        """Steer every step of `optimizer` from now on; see `LRCorrection.attach`."""
        power = choose_power(optimizer, self.power)
        history = open_history(self.reference)
        weights = choose_weights(
            optimizer, named_parameters, self.include, self.exclude, layouts, recorded=history.norms
        )
        reference = Reference(history, weights, self.align)
        rules = [_ScheduledWeight(weight, reference, self, power) for weight in weights]
        scope = Scope(insists=bool(self.include))
        return Attachment(optimizer, rules, scope, type(self).__name__, self._settings(power))

    def _settings(self, power: int) -> dict[str, Any]:
        return {
            "base_lr": self.base_lr,
            "power": power,
            "max_rotation": self.max_rotation,
            "align": self.align,
        }


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
