"""The weights of a model that can be normalised, by the class of their layer."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from torch import nn

from nmlightning.errors import InputError, check_choice
from nmlightning.name_patterns import matches, some
from nmlightning.optim.param_groups import find_output_layers
from nmlightning.parametrizations.weight_norm import Settings, WeightNorm
from nmlightning.weights import layer_weights
from nmlightning.weights.channel_norms import ChannelLayout
from nmlightning.weights.layer_weights import LayerKind as LayerKind

LAYER_KINDS: tuple[LayerKind, ...] = get_args(LayerKind)


def choose_layers(layers: Sequence[str] | None, include: Collection[str]) -> tuple[LayerKind, ...]:
    """Return the kinds, sorted; None means convolutions, or none where weights are named."""
    if layers is None:
        return () if include else ("conv",)
    for kind in layers:
        check_choice("layers", kind, LAYER_KINDS)
    if not layers and not include:
        raise InputError(f"layers is empty: name {', '.join(LAYER_KINDS)} or several.")
    return tuple(kind for kind in LAYER_KINDS if kind in layers)


@dataclass(frozen=True, eq=False)
class NormalisableWeight:
    """One weight, and all places that it is in: several where it is tied."""

    parameter: nn.Parameter
    places: list[layer_weights.WeightLocation] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Its first name, as in `model.named_parameters()`."""
        return self.places[0].name

    @property
    def layout(self) -> ChannelLayout:
        return self.places[0].layout

    @property
    def parametrizations(self) -> list[nn.Module]:
        """The parametrizations that compute the weight from its parameter, in order."""
        return list(self.places[0].parametrizations or ())

    @property
    def layer_name(self) -> str:
        """The class name of its layer, for messages."""
        return type(self.places[0].module).__name__

    @property
    def kinds(self) -> str:
        """The class names of those, for messages."""
        return ", ".join(type(x).__name__ for x in self.parametrizations)

    @property
    def norm(self) -> WeightNorm | None:
        return next((x for x in self.parametrizations if isinstance(x, WeightNorm)), None)

    @property
    def positions(self) -> list[int]:
        """Its position among the parameters of its module, in each layer."""
        return [list(p.module._parameters).index(p.attribute) for p in self.places]

    def is_of(self, kinds: Sequence[LayerKind]) -> bool:
        """Return whether it is the weight of a layer of one of the kinds, in one of its places."""
        return any(place.kind in kinds for place in self.places)

    def matches(self, patterns: Sequence[str]) -> bool:
        """Return whether a glob pattern is true of one of its names."""
        return any(matches(place.name, patterns) for place in self.places)


@dataclass(frozen=True)
class WeightChoice:
    """The weights to normalise, and those that are left for a reason."""

    chosen: list[NormalisableWeight] = field(default_factory=list)
    left: list[NormalisableWeight] = field(default_factory=list)  # of the output layer
    # Of classes that are not known, with their names: matrices, where linear layers are meant, and
    # what has more dimensions, where convolutions are.
    unknown: dict[str, str] = field(default_factory=dict)
    passed_over: list[str] = field(default_factory=list)  # of linear layers, by default


def find_weights(
    model: nn.Module,
    layers: Sequence[str] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> WeightChoice:
    """Return the weights to normalise, and those that are left, as `apply_weight_norm` says.

    Raises:
        InputError: another kind; a pattern that matches no weight, or none left; a layer whose
            weight is no parameter, as pruning leaves it.
    """
    kinds, weights = choose_layers(layers, include), _all_weights(model)
    computed = _find_computed(model)
    _check_patterns(model, weights, include)
    _check_patterns(model, weights, exclude, [place.name for place in computed])
    _check_no_computed_weight(computed, kinds, exclude)
    output, choice, is_doubtful = find_output_layers(model), WeightChoice(), False
    left = layer_weights.find_left_weights(model, (*include, *exclude)) if kinds else {}
    for weight in weights:
        gives_output = any(place.module in output.layers for place in weight.places)
        is_unknown = weight.name in left and not weight.places[0].is_known
        if is_unknown and ("linear" if weight.parameter.dim() == 2 else "conv") in kinds:
            choice.unknown[weight.name] = weight.layer_name
        if weight.matches(exclude):
            continue
        if weight.matches(include):
            choice.chosen.append(weight)
        elif weight.is_of(kinds):
            (choice.left if gives_output else choice.chosen).append(weight)
            is_doubtful |= any(place.path in output.candidates for place in weight.places)
        elif layers is None and not include and weight.is_of(("linear",)) and not gives_output:
            choice.passed_over.append(weight.name)
    if is_doubtful:
        names = some([w.name for w in choice.left]) + (" are" if len(choice.left) > 1 else " is")
        warnings.warn(
            f"{output.doubt}; {names} left out: choose by include or exclude.", stacklevel=3
        )
    if not choice.chosen:
        raise InputError(_explain_none(model, kinds, weights, choice.left))
    return choice


def _explain_none(
    model: nn.Module,
    kinds: Sequence[LayerKind],
    weights: Sequence[NormalisableWeight],
    left: Sequence[NormalisableWeight],
) -> str:
    output = left and f", and {left[0].name} is of the output layer (add it by include)"
    return (
        f"{type(model).__name__} has no weight to normalise: layers is {list(kinds)}"
        f"{output or ''}; "
        f"choose others, or name weights by include. It has {some([w.name for w in weights])}."
    )


def find_normalised_weights(
    model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[NormalisableWeight]:
    """Return the weights that are normalised, by ours alone; the patterns as for `find_weights`."""
    weights = _all_weights(model)
    _check_patterns(model, weights, (*include, *exclude))
    included = [weight for weight in weights if weight.matches(include)] if include else weights
    chosen = [weight for weight in included if weight.norm and not weight.matches(exclude)]
    if not chosen:
        raise InputError(f"{type(model).__name__} has no normalised weight.")
    for weight in chosen:
        if len(weight.parametrizations) > 1:
            raise InputError(f"{weight.name} has several parametrizations ({weight.kinds}).")
    return chosen


def normalised_weights(model: nn.Module, also: Collection[str] = ()) -> dict[str, Settings]:
    """Return the settings of each weight that is normalised, by its name, and those `also` has."""
    return {
        place.name: weight.norm.settings
        for weight in _all_weights(model)
        if weight.norm
        for place in weight.places
        if place is weight.places[0] or place.name in also
    }


def _check_patterns(
    model: nn.Module,
    weights: Sequence[NormalisableWeight],
    patterns: Sequence[str],
    others: Sequence[str] = (),
) -> None:
    names = [place.name for weight in weights for place in weight.places]
    known = some([weight.name for weight in weights])
    layer_weights.check_patterns(model, patterns, [*names, *others], known)


def _find_computed(model: nn.Module) -> dict[layer_weights.WeightLocation, list[str]]:
    """Return the weights that are no parameters, and the names of what is behind each."""
    return {
        place: [
            replace(place, attribute=each).name
            for each in layer_weights.matrices(place.module)
            if each.startswith(place.attribute)
        ]
        for place in layer_weights.find_places(model)
        if place.attribute not in place.module._parameters and place.parametrizations is None
    }


def _check_no_computed_weight(
    computed: Mapping[layer_weights.WeightLocation, list[str]],
    kinds: Sequence[LayerKind],
    exclude: Sequence[str],
) -> None:
    for place, parts in computed.items():
        if place.kind in kinds and not any(matches(x, exclude) for x in (place.name, *parts)):
            raise InputError(
                f"{place.name} is computed from {some(parts)}, as pruning and torch's old "
                f"weight_norm do it: make it plain first, or exclude {place.name!r}."
            )


def _all_weights(model: nn.Module) -> list[NormalisableWeight]:
    weights: dict[int, NormalisableWeight] = {}
    for path, module in layer_weights.plain_modules(model):
        for attribute in layer_weights.matrices(module):
            place = layer_weights.WeightLocation(module, path, attribute)
            computed = place.parametrizations
            q: Any = (
                module._parameters[attribute]
                if computed is None
                else next(computed.parameters(recurse=False))
            )
            weights.setdefault(id(q), NormalisableWeight(q)).places.append(place)
    return list(weights.values())
