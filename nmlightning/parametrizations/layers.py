"""The weights of a model that can be normalised, by the class of their layer."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn
from torch.nn.utils import parametrize

from nmlightning.errors import InputError, check_choice
from nmlightning.name_patterns import matches, some
from nmlightning.optim.param_groups import find_output_layers
from nmlightning.parametrizations.weight_norm import Settings, WeightNorm
from nmlightning.weights import layer_weights
from nmlightning.weights.channel_norms import ChannelLayout

LayerKind = Literal["conv", "linear", "recurrent", "embedding"]
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


def kind_of(module: nn.Module) -> LayerKind | None:
    """Return of which kind a layer is; None for what has no weight of its own, and for others."""
    form = layer_weights.find_layer_form(module)
    if form is not None:
        return form[0]
    if isinstance(module, nn.MultiheadAttention | nn.Bilinear):
        return "linear"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "recurrent"
    return "embedding" if isinstance(module, nn.Embedding | nn.EmbeddingBag) else None


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
        return any(
            kind_of(place.module) in kinds
            and place.attribute in layer_weights.weights_of(place.module)
            for place in self.places
        )

    def matches(self, patterns: Sequence[str]) -> bool:
        """Return whether a glob pattern is true of one of its names."""
        return any(matches(place.name, patterns) for place in self.places)


def find_weights(
    model: nn.Module,
    layers: Sequence[str] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> tuple[list[NormalisableWeight], list[NormalisableWeight]]:
    """Return the weights to normalise, and those of the output layer that are not for that.

    Args:
        model: any module.
        layers: kinds of layers, whose weights are meant but for the output layer's; None means
            convolutions, transposed ones too, or none where `include` names weights.
        include: glob patterns on the names of parameters, of two or more dimensions, that are
            meant, too.
        exclude: glob patterns on names that are left alone.

    Raises:
        InputError: another kind; a pattern that matches no weight, or none left; a layer whose
            weight is no parameter, as pruning leaves it.
    """
    kinds, weights = choose_layers(layers, include), _all_weights(model)
    computed = _find_computed(model)
    spared = [pattern for pattern in exclude if any(matches(x, [pattern]) for x in computed)]
    _check_patterns(model, weights, (*include, *(x for x in exclude if x not in spared)))
    _check_no_computed_weight(computed, kinds, exclude)
    output = find_output_layers(model)
    chosen: list[NormalisableWeight] = []
    left: list[NormalisableWeight] = []
    doubts: set[str] = set()
    for weight in weights:
        if weight.matches(exclude):
            continue
        if weight.matches(include):
            chosen.append(weight)
        elif weight.is_of(kinds):
            gives_output = any(place.module in output.layers for place in weight.places)
            (left if gives_output else chosen).append(weight)
            if any(place.path in output.candidates for place in weight.places):
                doubts.add(output.doubt)
    for doubt in doubts:
        names = some([w.name for w in left]) + (" are" if len(left) > 1 else " is")
        warnings.warn(
            f"{doubt}; {names} left out: name by include or exclude what is normalised and what is "
            "not.",
            stacklevel=3,
        )
    if not chosen:
        output_layer = [
            f", and {w.name} is of the output layer, which include has to name" for w in left
        ]
        raise InputError(
            f"{type(model).__name__} has no weight to normalise: layers is {list(kinds)}"
            f"{''.join(output_layer[:1])}; "
            f"choose others, or name weights by include. It has {some([w.name for w in weights])}."
        )
    return chosen, left


def find_unknown_weights(
    model: nn.Module, layers: Sequence[str] | None, include: Sequence[str], exclude: Sequence[str]
) -> dict[str, str]:
    """Return what `find_weights` leaves since its class is not known, with the class's name.

    They are matrices, where linear layers are meant, and what has more dimensions, where
    convolutions are.
    """
    kinds, left = (
        choose_layers(layers, include),
        layer_weights.find_left_weights(model, (*include, *exclude)),
    )
    return {
        w.name: w.layer_name
        for w in _all_weights(model)
        if w.name in left
        and not w.places[0].is_known
        and ("linear" if w.parameter.dim() == 2 else "conv") in kinds
    }


def find_passed_over(
    model: nn.Module, layers: Sequence[str] | None, include: Sequence[str], exclude: Sequence[str]
) -> list[str]:
    """Return the weights of linear layers that `find_weights` leaves by its default of `layers`."""
    if layers is not None or include:
        return []
    output = find_output_layers(model).layers
    return [
        w.name
        for w in _all_weights(model)
        if w.is_of(("linear",)) and not w.matches(exclude)
        if not any(place.module in output for place in w.places)
    ]


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


def normalised_weights(model: nn.Module) -> dict[str, Settings]:
    """Return the settings of each weight that is normalised, by its name."""
    return {weight.name: weight.norm.settings for weight in _all_weights(model) if weight.norm}


def _check_patterns(
    model: nn.Module, weights: Sequence[NormalisableWeight], patterns: Sequence[str]
) -> None:
    for pattern in patterns:
        if not any(weight.matches([pattern]) for weight in weights):
            raise InputError(
                f"The pattern {pattern!r} matches no weight of two or more dimensions in "
                f"{type(model).__name__}; there is {some([w.name for w in weights])}."
            )


def _find_computed(model: nn.Module) -> dict[str, tuple[nn.Module, list[str]]]:
    """Return each weight that is no parameter, its layer, and the names of what is behind it."""
    found = {}
    for path, module in layer_weights.plain_modules(model):
        for weight in layer_weights.weights_of(module):
            if weight in module._parameters or parametrize.is_parametrized(module, weight):
                continue
            own = [each for each in layer_weights.matrices(module) if each.startswith(weight)]
            parts = [layer_weights.WeightLocation(module, path, each).name for each in own]
            found[layer_weights.WeightLocation(module, path, weight).name] = module, parts
    return found


def _check_no_computed_weight(
    computed: Mapping[str, tuple[nn.Module, list[str]]],
    kinds: Sequence[LayerKind],
    exclude: Sequence[str],
) -> None:
    for name, (module, parts) in computed.items():
        if kind_of(module) in kinds and not any(matches(x, exclude) for x in (name, *parts)):
            raise InputError(
                f"{name} is computed from {some(parts)}, as pruning and torch's old "
                f"weight_norm do it: make it plain first, or exclude {name!r}."
            )


def _all_weights(model: nn.Module) -> list[NormalisableWeight]:
    weights: dict[int, NormalisableWeight] = {}
    for place in layer_weights.find_locations(model):
        computed, own = place.parametrizations, place.module._parameters
        parameter: Any = (
            own[place.attribute] if computed is None else next(computed.parameters(recurse=False))
        )
        weights.setdefault(id(parameter), NormalisableWeight(parameter)).places.append(place)
    return list(weights.values())
