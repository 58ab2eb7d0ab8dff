"""What rules share that steer any matrix, whether or not the loss feels its norm."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch.optim import LBFGS, Optimizer

from nmlightning.errors import InputError
from nmlightning.weights.history import NormHistory
from nmlightning.weights.steering.attachment import StepRule
from nmlightning.weights.steering.choose_weights import MATRICES
from nmlightning.weights.steering.rule import Steering
from nmlightning.weights.steering.scale_invariance import Scope, WholeScope
from nmlightning.weights.steering.steered_weight import SteeredWeight


class MatrixRule(Steering):
    """A rule for the weights of two or more dimensions.

    Args:
        include: glob patterns on weight names; empty means every such weight.
        exclude: glob patterns on weight names that are left alone.
    """

    least_dims = MATRICES

    def _make_rules(
        self, optimizer: Optimizer, weights: Sequence[SteeredWeight], history: NormHistory | None
    ) -> Sequence[StepRule]:
        if isinstance(optimizer, LBFGS):
            raise InputError(
                f"{type(self).__name__} works on single steps, and LBFGS takes several in one."
            )
        return [self._steer(weight) for weight in weights]

    def _make_scope(self) -> Scope:
        return WholeScope()

    def _settings(self, optimizer: Optimizer) -> dict[str, Any]:
        return {}

    @abstractmethod
    def _steer(self, weight: SteeredWeight) -> StepRule:
        """Return the rule for one weight."""
