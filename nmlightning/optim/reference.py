"""The recorded norms that a rule follows, on the weight's device and at the run's moment."""

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from nmlightning.errors import InputError, check_choice, is_number
from nmlightning.optim.families import Power, choose_power
from nmlightning.optim.parameters import SteeredWeight
from nmlightning.optim.step_hooks import Steering, StepRule
from nmlightning.weights.channel_norms import ROWS
from nmlightning.weights.history import Alignment, Moment, NormHistory


class Reference:
    """The norms of one recording, for the weights that are steered by it.

    Args:
        history: the recording.
        weights: what is steered.
        align: how a moment finds its record; see `NormHistory.place`.

    Attributes:
        dead: how many channels of each weight have no usable norm at the last moment asked for.

    Raises:
        InputError: a recording of another model, or an empty one.
    """

    def __init__(
        self, history: NormHistory, weights: Sequence[SteeredWeight], align: Alignment
    ) -> None:
        self.history = history
        self.align = align
        _check_weights(history, weights)
        if not len(self.history):
            raise InputError("The recording is empty.")
        self.dead: dict[str, int] = {}
        self._latest: dict[str, tuple[tuple[int, int, float], Tensor]] = {}

    def norms(self, weight: SteeredWeight, moment: Moment) -> Tensor:
        """Return the (C,) recorded norms of this rank's channels, in the dtype of its norms."""
        step, epoch = moment.get("step"), moment.get("epoch")
        place = self.history.place(
            step=None if step is None else int(step), epoch=epoch, align=self.align
        )
        known = self._latest.get(weight.name)
        if known is None or known[0] != place:
            below, above, share = place
            records = torch.from_numpy(
                self.history.norms[_recorded(weight, self.history)][[below, above]]
            )
            first, second = records.to(weight.norms_dtype)
            norms = torch.lerp(first, second, share)
            self._note_dead(weight.name, norms)
            known = self._latest[weight.name] = place, weight.local_channels(norms)
        return known[1]

    def _note_dead(self, name: str, norms: Tensor) -> None:
        dead = int((~usable(norms)).sum())
        if dead > self.dead.get(name, 0):
            warnings.warn(
                f"{dead} of {len(norms)} channels of {name} have a recorded norm that is zero or "
                "not finite; they are left unsteered.",
                stacklevel=2,
            )
        self.dead[name] = dead


def _check_weights(history: NormHistory, weights: Sequence[SteeredWeight]) -> None:
    try:
        history.check_weights({_recorded(w, history): w.channels for w in weights})
    except InputError as error:
        shaped = [w for w in weights if w.name in history.norms and w.layout == ROWS]
        if not any(_may_be_transposed(w, history.norms[w.name].shape[1]) for w in shaped):
            raise
        raise InputError(
            f"{error} If it is a transposed convolution, give attach the model itself, which tells "
            "where its channels are."
        ) from error


def _may_be_transposed(weight: SteeredWeight, recorded: int) -> bool:
    """Whether it has another number of channels, yet could have that in so many groups."""
    shape = weight.parameter.shape
    return len(shape) >= 3 and recorded != shape[0] and recorded % shape[1] == 0


def _recorded(weight: SteeredWeight, history: NormHistory) -> str:
    """Return the name of its norms: those of what is hidden behind a normalised weight."""
    hidden = f"{weight.name}_v"
    return hidden if hidden in history.norms else weight.name


def usable(norms: Tensor) -> Tensor:
    """Return (C,) bool: where a recorded norm can be followed."""
    return (norms > 0) & norms.isfinite()


class FollowingRule(Steering):
    """A rule that looks recorded norms up at each step.

    Args:
        reference: a `NormHistory`, its file, or the folder of the run that made it.
        power: 1 or 2; "auto" takes that of the optimizer's family.
        align: which record a moment has; see `NormHistory.place`.
        max_rotation: the largest rotation per step, in radians, or None.
        include: as for `Steering`.
        exclude: as for `Steering`.
    """

    def __init__(
        self,
        reference: NormHistory | str | Path,
        *,
        power: Power,
        align: Alignment,
        max_rotation: float | None,
        include: Sequence[str],
        exclude: Sequence[str],
    ) -> None:
        super().__init__(include=include, exclude=exclude)
        check_choice("align", align, get_args(Alignment))
        check_positive(max_rotation=max_rotation)
        if not isinstance(reference, NormHistory | str | Path):
            raise InputError(f"reference is a NormHistory or a path, got {reference!r}.")
        self.reference = reference
        self.power = power
        self.align: Alignment = align
        self.max_rotation = max_rotation

    def _open_reference(self) -> NormHistory:
        given = self.reference
        return given if isinstance(given, NormHistory) else NormHistory.load(given)

    def _make_rules(
        self, optimizer: Optimizer, weights: Sequence[SteeredWeight], history: NormHistory | None
    ) -> Sequence[StepRule]:
        assert history is not None
        power, reference = (
            choose_power(optimizer, self.power),
            Reference(history, weights, self.align),
        )
        return [self._follow(weight, reference, power) for weight in weights]

    def _settings(self, optimizer: Optimizer) -> dict[str, Any]:
        return {
            "power": choose_power(optimizer, self.power),
            "align": self.align,
            "max_rotation": self.max_rotation,
        }

    @abstractmethod
    def _follow(self, weight: SteeredWeight, reference: Reference, power: int) -> StepRule:
        """Return the rule for one weight."""


def check_positive(**settings: object) -> None:
    """Raise InputError for anything but a positive number, or None, which stands for none."""
    for name, value in settings.items():
        if value is not None and not (is_number(value) and value > 0):  # type: ignore[operator]
            raise InputError(f"{name} is a positive number, or None, got {value!r}.")
