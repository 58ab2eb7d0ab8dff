"""What rules share that steer any matrix, whether or not the loss feels its norm."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from torch.optim import LBFGS, Optimizer

from nmlightning.errors import InputError
from nmlightning.name_patterns import check_lists
from nmlightning.weights.channel_norms import ChannelLayout
from nmlightning.weights.steering.attachment import Attachment, StepRule
from nmlightning.weights.steering.choose_weights import MATRICES, choose_weights
from nmlightning.weights.steering.named_weights import Model
from nmlightning.weights.steering.scale_invariance import WholeScope
from nmlightning.weights.steering.steered_weight import SteeredWeight
from nmlightning.weights.steering.steering import Steering


class MatrixRule(Steering):
    """A rule for the weights of two or more dimensions.

    Args:
        include: glob patterns on weight names; empty means every such weight.
        exclude: glob patterns on weight names that are left alone.
    """

    least_dims = MATRICES

    def __init__(self, *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        check_lists(include=include, exclude=exclude)
        self.include = tuple(include)
        self.exclude = tuple(exclude)

    def attach(
        self,
        optimizer: Optimizer,
        named_parameters: Model,
        layouts: Mapping[str, ChannelLayout] | None = None,
    ) -> Attachment:
        """Steer every step of `optimizer` from now on; see `LRCorrection.attach`."""
        if isinstance(optimizer, LBFGS):
            raise InputError(
                f"{type(self).__name__} works on single steps, and LBFGS takes several in one."
            )
        patterns = self.include, self.exclude
        weights = choose_weights(
            optimizer, named_parameters, *patterns, layouts, least_dims=self.least_dims
        )
        rules = [self._steer(weight) for weight in weights]
        return Attachment(optimizer, rules, WholeScope(), type(self).__name__)

    @abstractmethod
    def _steer(self, weight: SteeredWeight) -> StepRule:
        """Return the rule for one weight."""
