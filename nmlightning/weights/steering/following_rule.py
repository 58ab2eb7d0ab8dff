"""What the rules share that follow a recording."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from torch.optim import Optimizer

from nmlightning.errors import InputError, check_choice, is_number
from nmlightning.weights.history import Alignment, NormHistory
from nmlightning.weights.optimizer_family import Power, choose_power
from nmlightning.weights.steering.attachment import StepRule
from nmlightning.weights.steering.reference import Reference
from nmlightning.weights.steering.rule import Steering
from nmlightning.weights.steering.steered_weight import SteeredWeight


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
