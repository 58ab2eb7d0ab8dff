"""The weights of a model's layers: their names, the tensors that hold them, their channels."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from nmlightning.errors import InputError, check_lists
from nmlightning.name_patterns import matches, plain_name, some, unmatched
from nmlightning.weights.channel_norms import (
    ROWS,
    ChannelLayout,
    channel_norms,
    gather_channels,
    is_flat,
)


@dataclass(frozen=True, eq=False)
class WeightLocation:
    """An attribute of a module that is a weight; layers may share one weight."""

    module: nn.Module
    path: str
    attribute: str

    @property
    def name(self) -> str:
        """As in `model.named_parameters()`, without what wrappers and parametrizations add."""
        return plain_name(f"{self.path}.{self.attribute}".lstrip("."))

    @property
    def layout(self) -> ChannelLayout:
        """The place of its output channels."""
        if isinstance(self.module, _ConvTransposeNd) and self.attribute == "weight":
            return ChannelLayout(self.module.groups)
        return ROWS

    @property
    def parametrizations(self) -> ParametrizationList | None:
        """The parametrizations that compute it, if any."""
        if not parametrize.is_parametrized(self.module, self.attribute):
            return None
        return self.module.parametrizations[self.attribute]  # type: ignore[index, return-value]


def find_locations(model: nn.Module) -> Iterator[WeightLocation]:
    """Yield every location of a weight."""
    for path, module in plain_modules(model):
        for attribute in matrices(module):
            yield WeightLocation(module, path, attribute)


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


_SUFFIX = "_v"
_BEHIND = ("weight_v", "weight_orig")
LAZY_WAY_OUT = "run a batch through the model before the fit"


@dataclass(frozen=True, eq=False)
class LayerWeight:
    """The weight of one layer.

    Attributes:
        name: as in `model.named_parameters()`, without what wrappers and parametrizations add; that
            of the unnormalised weight v behind a normalised one ends in `_v`.
        parameter: what an optimizer moves; of a parametrized or pruned weight its original.
        layout: where its output channels are.
        computed: for the normalised weight itself, what computes its norms from `parameter`.
    """

    name: str
    parameter: Tensor
    layout: ChannelLayout = ROWS
    computed: Callable[[Tensor], Tensor] | None = None

    def norms(self) -> Tensor:
        """Return ‖w_i‖₂, (C,), of all ranks' channels; every rank has to ask."""
        if self.computed is not None:
            return self.computed(self.parameter)
        return gather_channels(channel_norms(self.parameter, layout=self.layout))

    @property
    def channels(self) -> int:
        """The number of output channels."""
        return self.layout.channels(self.parameter.shape)


def find_layer_weights(
    model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[LayerWeight]:
    """Return the weights of all convolutions and linear layers, and all that are normalised.

    A weight that layers share appears once, under its first name. A lazy layer has none before its
    first batch.

    Args:
        model: any module.
        include: glob patterns on names of parameters of two or more dimensions, such as
            `layer1.*.weight`, also those of an embedding or an LSTM; empty means those above.
        exclude: glob patterns on names that are left out.

    Raises:
        InputError: a pattern that matches no such weight; none left.
    """
    check_lists(include=include, exclude=exclude)
    places = list(_places(model))
    wrong = unmatched((*include, *exclude), [place.name for place in places])
    if wrong is not None:
        raise InputError(
            f"The pattern {wrong!r} matches no weight of two or more dimensions in "
            f"{type(model).__name__}; there is {some([place.name for place in places], 8)}."
        )
    chosen = [place for place in places if place.is_chosen(include, exclude)]
    held = [place for place in chosen if place.original is not None]
    weights = {id(place.original): place.weight() for place in reversed(held)}
    if not weights:
        lazy = find_lazy_weights(model)
        but = f" but {lazy[0]}, which has no shape yet; {LAZY_WAY_OUT}" if lazy else ""
        raise InputError(
            f"{type(model).__name__} has no convolution or linear layer to watch{but}."
        )
    return list(reversed(weights.values()))


def find_recorded_weights(
    model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[LayerWeight]:
    """Return the same, and for each that is normalised both the weight w and the unnormalised v.

    See `find_layer_weights`.
    """
    norms = {id(p.original): p.norm for p in _places(model) if p.norm is not None}
    weights = find_layer_weights(model, include, exclude)
    normalised = [
        replace(w, name=w.name.removesuffix(_SUFFIX), computed=norms[id(w.parameter)].channel_norms)
        for w in weights
        if id(w.parameter) in norms
    ]
    return [*normalised, *weights]


def find_lazy_weights(
    model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[str]:
    """Return the names of the weights, chosen so, that have no shape before their first batch."""
    return [p.name for p in _places(model) if p.is_lazy and p.is_chosen(include, exclude)]


class _RecordedLocation(WeightLocation):
    """One, as a recording sees it."""

    @property
    def is_of_layer(self) -> bool:
        return isinstance(self.module, nn.Linear | _ConvNd)

    @property
    def is_lazy(self) -> bool:
        parameter = self.module._parameters.get(self.attribute)
        return parameter is not None and is_lazy(parameter)

    @property
    def norm(self) -> Any:
        """Its one parametrization, if that knows the norms of what it computes."""
        computed = self.parametrizations
        norm = computed[0] if computed is not None and len(computed) == 1 else None
        return norm if hasattr(norm, "channel_norms") else None

    @property
    def original(self) -> Tensor | None:
        """The parameter behind it that has its shape, without computing it anew.

        It is `weight_v` under the old `torch.nn.utils.weight_norm`, `weight_orig` if it is pruned.
        """
        if self.is_lazy:
            return None
        computed = self.parametrizations
        if computed is None:
            names = [self.attribute, *(_BEHIND if self.is_of_layer else ())]
            held = (self.module._parameters.get(name) for name in names)
            return next((parameter for parameter in held if parameter is not None), None)
        originals = list(computed.parameters(recurse=False))
        if isinstance(self.module, nn.Linear | _ConvNd):
            shape = _weight_shape(self.module)
            return next((original for original in originals if original.shape == shape), None)
        return originals[0] if len(originals) == 1 else None

    def is_chosen(self, include: Sequence[str], exclude: Sequence[str]) -> bool:
        by_default = self.is_of_layer or self.norm is not None
        is_included = matches(self.name, include) if include else by_default
        return is_included and not matches(self.name, exclude)

    def weight(self) -> LayerWeight:
        """Return it, as the unnormalised weight if it is normalised."""
        parameter = self.original
        assert parameter is not None
        return LayerWeight(self.name + _SUFFIX * (self.norm is not None), parameter, self.layout)


def _places(model: nn.Module) -> Iterator[_RecordedLocation]:
    """Yield the weight of each layer, also where it is no parameter, and all others."""
    for path, module in plain_modules(model):
        is_layer = isinstance(module, nn.Linear | _ConvNd)
        for attribute in ["weight"] if is_layer else matrices(module):
            yield _RecordedLocation(module, path, attribute)


def _weight_shape(module: nn.Linear | _ConvNd) -> tuple[int, ...]:
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    inputs, outputs = module.in_channels, module.out_channels
    first, second = (inputs, outputs) if isinstance(module, _ConvTransposeNd) else (outputs, inputs)
    return (first, second // module.groups, *module.kernel_size)
