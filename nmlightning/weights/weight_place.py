"""Where in a model its weights are: attributes that are matrices, or are computed from one."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from nmlightning.weights.channel_norms import ROWS, ChannelLayout
from nmlightning.weights.plain_name import plain_name
from nmlightning.weights.shards import is_flat


@dataclass(frozen=True, eq=False)
class WeightPlace:
    """An attribute of a module that is a weight; the same weight may be in several places."""

    module: nn.Module
    path: str
    attribute: str

    @property
    def name(self) -> str:
        """As in `model.named_parameters()`, without what wrappers and parametrizations add."""
        return plain_name(f"{self.path}.{self.attribute}".lstrip("."))

    @property
    def is_of_convolution(self) -> bool:
        """Whether it is the weight of a convolution."""
        return isinstance(self.module, _ConvNd) and self.attribute == "weight"

    @property
    def layout(self) -> ChannelLayout:
        """Where its output channels are."""
        module = self.module
        if self.is_of_convolution and isinstance(module, _ConvTransposeNd):
            return ChannelLayout(module.groups)
        return ROWS

    @property
    def parametrizations(self) -> ParametrizationList | None:
        """What computes it, if anything does."""
        if not parametrize.is_parametrized(self.module, self.attribute):
            return None
        return self.module.parametrizations[self.attribute]  # type: ignore[index, return-value]


def find_places(model: nn.Module) -> Iterator[WeightPlace]:
    """Yield every place of a weight."""
    for path, module in plain_modules(model):
        for attribute in matrices(module):
            yield WeightPlace(module, path, attribute)


def matrices(module: nn.Module) -> Iterator[str]:
    """Yield the parameters of two or more dimensions, then those that are computed.

    Parameters that have no shape yet, or that FSDP1 flattened, may be weights, too.
    """
    for attribute, q in module._parameters.items():
        if q is not None and (is_lazy(q) or q.dim() >= 2 or is_flat(q)):
            yield attribute
    if parametrize.is_parametrized(module):
        yield from module.parametrizations  # type: ignore[misc]


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules with their paths, but for those that compute weights."""
    for path, module in model.named_modules():
        if "parametrizations" not in path.split("."):
            yield path, module
