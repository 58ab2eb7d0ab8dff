"""LRCorrection: train without weight decay at the effective learning rates of a run with it."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from nmlightning.errors import check_choice
from nmlightning.optim.families import Power
from nmlightning.optim.parameters import SteeredWeight, project, scale_step
from nmlightning.optim.reference import FollowingRule, Reference, check_positive, usable
from nmlightning.optim.step_hooks import StepRule
from nmlightning.weights.channel_norms import channel_norms
from nmlightning.weights.history import Alignment, Moment, NormHistory

Mode = Literal["paper", "stable"]
Granularity = Literal["channel", "layer"]


class LRCorrection(FollowingRule):
    """Scale each channel's step so that its direction moves as in a recorded run.

    With ‖r_i‖ the recorded norm at the same moment and q the optimizer's power (2 for SGD):

        paper:   Δw_i ← Δw_i · (‖w_i‖ / ‖r_i‖)^q
        stable:  Δw_i ← Δw_i · min((‖w_i(0)‖ / ‖r_i‖)^q, max_factor),
                 no longer than max_rotation · ‖w_i‖; then w_i ← w_i · ‖w_i(0)‖ / ‖w_i‖

    The paper's rule takes ‖w_i‖ out of the step, and with it the brake that a growing norm is: a
    channel whose reference decayed to almost nothing grows geometrically. The stable rule holds the
    norm where it started, which changes nothing for a scale-invariant weight.

    Args:
        reference: the recording of a run with weight decay: a `NormHistory`, its file, or the
            folder of the run.
        mode: "stable", or "paper" for the literal rule, which warns.
        power: q, 1 or 2; "auto" takes that of the optimizer's family.
        granularity: a factor for each "channel", or one for a "layer", of the root mean square of
            its norms.
        max_factor: the largest factor of mode "stable".
        max_rotation: the largest rotation per step of mode "stable", in radians.
        align: which record a moment has; see `NormHistory.place`. By default "official" in mode
            "paper", and "interpolate" in mode "stable".
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
        mode: Mode = "stable",
        power: Power = "auto",
        granularity: Granularity = "channel",
        max_factor: float | None = None,
        max_rotation: float | None = 0.2,
        *,
        align: Alignment | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        check_choice("mode", mode, get_args(Mode))
        check_choice("granularity", granularity, get_args(Granularity))
        check_positive(max_factor=max_factor)
        super().__init__(
            reference,
            power=power,
            align=align or ("official" if mode == "paper" else "interpolate"),
            max_rotation=max_rotation,
            include=include,
            exclude=exclude,
        )
        if mode == "paper":
            warnings.warn(
                'LRCorrection(mode="paper") has no brake: where a reference norm decays to almost '
                'nothing the weights grow without bound. Use mode="stable" unless you study that.',
                stacklevel=2,
            )
        self.mode = mode
        self.granularity = granularity
        self.max_factor = max_factor

    def _follow(self, weight: SteeredWeight, reference: Reference, power: int) -> StepRule:
        return _CorrectedWeight(weight, reference, self, power)

    def _settings(self, optimizer: Optimizer) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "granularity": self.granularity,
            "max_factor": self.max_factor,
            **super()._settings(optimizer),
        }


class _CorrectedWeight:
    """The rule for one weight."""

    def __init__(
        self, weight: SteeredWeight, reference: Reference, settings: LRCorrection, power: int
    ) -> None:
        self.weight = weight
        self._reference = reference
        self._settings = settings
        self._power = power
        self._initial = weight.norms()
        self.factors: Tensor | None = None

    def after_step(self, before: Tensor, moment: Moment) -> Tensor:
        settings = self._settings
        recorded = self._reference.norms(self.weight, moment)
        if settings.mode == "paper":
            current = channel_norms(before, layout=self.weight.layout)
            undone, self.factors = scale_step(self.weight, before, self._factors(current, recorded))
            return undone
        factors = self._factors(self._initial, recorded)
        if settings.max_factor is not None:
            factors = factors.clamp(max=settings.max_factor)
        undone, self.factors = scale_step(self.weight, before, factors, settings.max_rotation)
        project(self.weight, self._initial.where(usable(recorded), 0.0))
        return undone

    def _factors(self, norms: Tensor, recorded: Tensor) -> Tensor:
        """Return (‖w_i‖ / ‖r_i‖)^q; 1 where the reference is dead: zero or not finite."""
        alive = usable(recorded)
        if self._settings.granularity == "layer":
            known = recorded.where(alive, 0.0)
            norms, recorded = (self._root_mean_square(x) for x in (norms, known))
        return torch.where(alive, (norms / recorded) ** self._power, 1.0)

    def _root_mean_square(self, norms: Tensor) -> Tensor:
        mean = self.weight.all_channels(norms).square().mean()
        return mean.sqrt().expand_as(norms)

    def state_dict(self) -> dict[str, Any]:
        return {"initial": self.weight.all_channels(self._initial).clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._initial.copy_(self.weight.local_channels(state["initial"]))
