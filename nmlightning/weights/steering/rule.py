"""What every rule is that steers the steps of an optimizer, and how it is put to work."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch.optim import Optimizer

from nmlightning.name_patterns import check_lists
from nmlightning.weights.channel_norms import ChannelLayout
from nmlightning.weights.history import NormHistory
from nmlightning.weights.steering.attachment import Attachment, StepRule
from nmlightning.weights.steering.choose_weights import CONVOLUTIONS, choose_weights
from nmlightning.weights.steering.named_weights import Model
from nmlightning.weights.steering.scale_invariance import Scope
from nmlightning.weights.steering.steered_weight import SteeredWeight


class Steering(ABC):
    """A rule: its settings, and `attach`.

    Args:
        include: glob patterns on the names of the weights to steer; empty means those of
            `least_dims` or more dimensions.
        exclude: glob patterns on names that are left alone.
    """

    least_dims: ClassVar[int] = CONVOLUTIONS

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
        """Steer every step of `optimizer` from now on.

        Args:
            optimizer: its weight decay must be 0 for what is steered.
            named_parameters: of the model, as `model.named_parameters()` gives them, or the model
                itself. Names alone do not tell a convolution from another parameter of three or
                more dimensions, nor a transposed one.
            layouts: the layouts of weights whose output channels are not along dimension 0; only
                names alone need them.

        Returns:
            The attachment, whose `remove` undoes it.

        Raises:
            InputError: no weight to steer; one that decays, or that is steered already; an
                optimizer that the rule is not for, or of which it is not known what norms do; a
                recording that cannot be read, or of another model.
        """
        history = self._open_reference()
        weights = choose_weights(
            optimizer,
            named_parameters,
            self.include,
            self.exclude,
            layouts,
            recorded=None if history is None else history.norms,
            least_dims=self.least_dims,
        )
        rules = self._make_rules(optimizer, weights, history)
        name, settings = type(self).__name__, self._settings(optimizer)
        return Attachment(optimizer, rules, self._make_scope(), name, settings)

    def _open_reference(self) -> NormHistory | None:
        """Return the recording that is followed, if any."""
        return None

    def _make_scope(self) -> Scope:
        """Return what decides which of the chosen weights are steered."""
        return Scope(insists=bool(self.include))

    @abstractmethod
    def _make_rules(
        self, optimizer: Optimizer, weights: Sequence[SteeredWeight], history: NormHistory | None
    ) -> Sequence[StepRule]:
        """Return what is done to each weight, or raise InputError for another optimizer."""

    @abstractmethod
    def _settings(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return what must stay as it is in a run that goes on from this one."""
