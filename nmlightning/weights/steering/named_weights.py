"""The parameters of a model under their plain names, and what is known of their layers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from nmlightning.errors import InputError
from nmlightning.weights.channel_norms import ROWS, ChannelLayout
from nmlightning.weights.layer_weights import find_layer_weights
from nmlightning.weights.plain_name import plain_name

Model = nn.Module | Iterable[tuple[str, Tensor]]
"""A model, or its `named_parameters()`, which tell no more than names and shapes."""


@dataclass(frozen=True)
class NamedWeights:
    """The parameters of a model.

    Attributes:
        parameters: by plain name.
        layouts: where the output channels are, of the weights of which it is known.
        layers: the names of the weights of convolutions and linear layers; None where only shapes
            tell what is one.
    """

    parameters: Mapping[str, Tensor]
    layouts: Mapping[str, ChannelLayout]
    layers: frozenset[str] | None = None

    @classmethod
    def of(cls, model: Model, layouts: Mapping[str, ChannelLayout] | None = None) -> "NamedWeights":
        """Return those of a model; `layouts` are those of names alone."""
        if not isinstance(model, nn.Module):
            return cls(_plain_names(model), layouts or {})
        weights = find_layer_weights(model)
        names = {id(weight.parameter): weight.name for weight in weights}
        parameters = {
            names.get(id(parameter), plain_name(name)): parameter
            for name, parameter in model.named_parameters()
        }
        known = {weight.name: weight.layout for weight in weights} | dict(layouts or {})
        return cls(parameters, known, frozenset(weight.name for weight in weights))

    def layout(self, name: str) -> ChannelLayout:
        """Return where the output channels of a weight are: along dimension 0 if unknown."""
        return self.layouts.get(name, ROWS)

    def is_convolution(self, name: str) -> bool:
        """Return whether it is a convolution's weight: of three or more dimensions, in a layer."""
        convolves = self.layers is None or name in self.layers
        return convolves and self.parameters[name].dim() >= 3


def _plain_names(named_parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    pairs = list(named_parameters) if isinstance(named_parameters, Iterable) else [named_parameters]
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise InputError(
                f"attach takes the model or its named_parameters(), got {type(pair).__name__}."
            )
    return {plain_name(name): parameter for name, parameter in pairs}
