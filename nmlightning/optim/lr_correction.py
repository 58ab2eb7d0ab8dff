"""LRCorrection: train without weight decay at the effective learning rates of a run with it."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from nmlightning.errors import check_choice, check_positive
from nmlightning.optim.families import Power
from nmlightning.optim.parameters import (
    OptimizedWeight,
    State,
    check_reference,
    project,
    scale_step,
)
from nmlightning.optim.step_hooks import StepRule
from nmlightning.weights.channel_norms import channel_norms, is_usable
from nmlightning.weights.history import Alignment, NormHistory

Mode = Literal["paper", "stable"]
Granularity = Literal["channel", "layer"]


class LRCorrection(StepRule):
    """Scale each channel's step so that its direction moves as in a recorded run.

    With ‖r_i‖ the recorded norm at the same moment and q the optimizer's power (2 for SGD):

        paper:   Δw_i ← Δw_i · (‖w_i‖ / ‖r_i‖)^q
        stable:  Δw_i ← Δw_i · min((‖w_i(0)‖ / ‖r_i‖)^q, max_factor),
                 no longer than max_rotation · ‖w_i‖; then w_i ← w_i · ‖w_i(0)‖ / ‖w_i‖

    The paper's rule takes ‖w_i‖ out of the step: a channel whose reference decayed to almost
    nothing grows geometrically. The stable rule holds the norm where it started, which changes
    nothing for a scale-invariant weight.

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
            scale-invariant by its gradients.
        exclude: glob patterns on names of weights that are not steered.

    Raises:
        InputError: a setting outside what is allowed. In `attach`: as `StepRule.attach` says.

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
        super().__init__(include, exclude)
        align = align or ("official" if mode == "paper" else "interpolate")
        check_reference(reference, align, max_rotation)
        if mode == "paper":
            warnings.warn(
                'LRCorrection(mode="paper") lets weights grow without bound if a reference norm '
                'decays to almost nothing. Use mode="stable" unless you study that.',
                stacklevel=2,
            )
        self.reference = reference
        self.mode = mode
        self.granularity = granularity
        self.max_factor = max_factor
        self.power = power
        self.align = align
        self.max_rotation = max_rotation

    def init_state(self, weight: OptimizedWeight) -> State:
        """Return ‖w_i(0)‖."""
        return {"initial": weight.norms()}

    def after_step(
        self, weight: OptimizedWeight, before: Tensor, recorded: Tensor | None, state: State
    ) -> tuple[Tensor, Tensor]:
        """Scale the step, and in mode "stable" project the weight."""
        assert recorded is not None, "there is a reference"
        if self.mode == "paper":
            current = channel_norms(before, layout=weight.layout)
            return scale_step(weight, before, self._factors(weight, current, recorded))
        factors = self._factors(weight, state["initial"], recorded)
        if self.max_factor is not None:
            factors = factors.clamp(max=self.max_factor)
        skipped, factors = scale_step(weight, before, factors, self.max_rotation)
        initial = state["initial"]  # also the norms before the step
        bounded = None if self.max_rotation is None else initial
        project(weight, initial.where(is_usable(recorded), 0.0), bounded)
        return skipped, factors

    def _factors(self, weight: OptimizedWeight, norms: Tensor, recorded: Tensor) -> Tensor:
        """Return (‖w_i‖ / ‖r_i‖)^q; 1 where the reference is dead: zero or not finite."""
        alive = is_usable(recorded)
        if self.granularity == "layer":
            known = recorded.where(alive, 0.0)
            squares = (weight.all_channels(x).square().mean() for x in (norms, known))
            norms, recorded = (mean.sqrt().expand_as(recorded) for mean in squares)
        return torch.where(alive, (norms / recorded) ** int(self.power), 1.0)
