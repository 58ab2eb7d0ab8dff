"""LRCorrection: train without weight decay at the effective learning rates of a run with it."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from nmlightning.errors import check_choice
from nmlightning.name_patterns import check_lists
from nmlightning.weights.channel_norms import ChannelLayout, channel_norms
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

Mode = Literal["paper", "stable"]
Granularity = Literal["channel", "layer"]


class LRCorrection(Steering):
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
        InputError: a setting outside what is allowed. In `attach`: see there.

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
        align = align or ("official" if mode == "paper" else "interpolate")
        check_choice("align", align, get_args(Alignment))
        check_reference(reference)
        check_positive(max_factor=max_factor, max_rotation=max_rotation)
        check_lists(include=include, exclude=exclude)
        if mode == "paper":
            warnings.warn(
                'LRCorrection(mode="paper") has no brake: where a reference norm decays to almost '
                'nothing the weights grow without bound. Use mode="stable" unless you study that.',
                stacklevel=2,
            )
        self.reference = reference
        self.mode = mode
        self.power = power
        self.granularity = granularity
        self.max_factor = max_factor
        self.max_rotation = max_rotation
        self.align: Alignment = align
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
            optimizer: any; its weight decay must be 0 for what is steered.
            named_parameters: of the model, as `model.named_parameters()` gives them, or the model
                itself. Names alone do not tell a convolution from another parameter of three or
                more dimensions, nor a transposed one.
            layouts: the layouts of weights whose output channels are not along dimension 0; only
                names alone need them.

        Returns:
            The attachment, whose `remove` undoes it.

        Raises:
            InputError: an optimizer whose power is not known; no weight to steer; one that decays,
                or that is steered already; a recording that cannot be read, or of another model.
        """
        power = choose_power(optimizer, self.power)
        history = open_history(self.reference)
        weights = choose_weights(
            optimizer, named_parameters, self.include, self.exclude, layouts, recorded=history.norms
        )
        reference = Reference(history, weights, self.align)
        rules = [_CorrectedWeight(weight, reference, self, power) for weight in weights]
        scope = Scope(insists=bool(self.include))
        return Attachment(optimizer, rules, scope, type(self).__name__, self._settings(power))

    def _settings(self, power: int) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "power": power,
            "granularity": self.granularity,
            "max_factor": self.max_factor,
            "max_rotation": self.max_rotation,
            "align": self.align,
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
