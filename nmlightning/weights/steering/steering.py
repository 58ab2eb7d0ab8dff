"""What every rule is that steers the steps of an optimizer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch.optim import Optimizer

from nmlightning.weights.channel_norms import ChannelLayout
from nmlightning.weights.steering.attachment import Attachment
from nmlightning.weights.steering.choose_weights import CONVOLUTIONS
from nmlightning.weights.steering.named_weights import Model


class Steering(ABC):
    """A rule: its settings, and how it is put to work.

    Attributes:
        include: glob patterns on the names of the weights to steer.
        exclude: glob patterns on names that are left alone.
        least_dims: the fewest dimensions of what is steered where `include` is empty.
    """

    include: tuple[str, ...]
    exclude: tuple[str, ...]
    least_dims: ClassVar[int] = CONVOLUTIONS

    @abstractmethod
    def attach(
        self,
        optimizer: Optimizer,
        named_parameters: Model,
        layouts: Mapping[str, ChannelLayout] | None = None,
    ) -> Attachment:
        """Steer every step of `optimizer` from now on; see `LRCorrection.attach`."""
