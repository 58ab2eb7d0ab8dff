"""The weights of a model that can be normalised, and where in it each one is."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from nmlightning.errors import InputError
from nmlightning.name_patterns import matches, some
from nmlightning.weights.channel_norms import ChannelLayout
from nmlightning.weights.weight_norm.settings import Settings
from nmlightning.weights.weight_norm.weight_norm import WeightNorm
from nmlightning.weights.weight_place import WeightPlace, find_places, matrices, plain_modules


@dataclass(frozen=True, eq=False)
class Site:
    """One weight, and all places that it is in: several where it is tied."""

    parameter: nn.Parameter
    places: list[WeightPlace] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Its first name, as in `model.named_parameters()`."""
        return self.places[0].name

    @property
    def layout(self) -> ChannelLayout:
        """Where its output channels are."""
        return self.places[0].layout

    @property
    def parametrizations(self) -> list[nn.Module]:
        """What computes the weight from its parameter, in order."""
        return list(self.places[0].parametrizations or ())

    @property
    def kinds(self) -> str:
        """The class names of those, for messages."""
        return ", ".join(type(x).__name__ for x in self.parametrizations)

    @property
    def norm(self) -> WeightNorm | None:
        """Its weight norm, if it has one."""
        return next((x for x in self.parametrizations if isinstance(x, WeightNorm)), None)

    @property
    def positions(self) -> list[int]:
        """Which of its module's parameters it is, in each place."""
        return [list(p.module._parameters).index(p.attribute) for p in self.places]

    def matches(self, patterns: Sequence[str]) -> bool:
        """Return whether a glob pattern is true of one of its names."""
        return any(matches(place.name, patterns) for place in self.places)


def find_sites(
    model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[Site]:
    """Return the weights to normalise.

    Args:
        model: any module.
        include: glob patterns on the names of parameters, of two or more dimensions; empty means
            every convolution, transposed ones too.
        exclude: glob patterns on names that are left alone.

    Raises:
        InputError: a pattern that matches no weight, or none left; a convolution whose weight is
            no parameter, as pruning leaves it.
    """
    sites = _all_sites(model)
    chosen = _choose(
        model, sites, [s for s in sites if s.places[0].is_of_convolution], include, exclude
    )
    if not include:
        _check_no_computed_weight(model, exclude)
    if not chosen:
        raise InputError(
            f"{type(model).__name__} has no weight to normalise: by default these are the "
            f"convolutions; name others by include. It has {some([s.name for s in sites])}."
        )
    return chosen


def find_normalised_sites(
    model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[Site]:
    """Return the weights that are normalised; the patterns as for `find_sites`.

    Raises:
        InputError: a pattern that matches none of them, none left, or one with other
            parametrizations, too.
    """
    sites = _all_sites(model)
    chosen = [site for site in _choose(model, sites, sites, include, exclude) if site.norm]
    if not chosen:
        raise InputError(f"{type(model).__name__} has no normalised weight.")
    for site in chosen:
        if len(site.parametrizations) > 1:
            raise InputError(f"{site.name} has several parametrizations ({site.kinds}).")
    return chosen


def normalised_weights(model: nn.Module) -> dict[str, Settings]:
    """Return the settings of each weight that is normalised, by its name."""
    return {site.name: site.norm.settings for site in _all_sites(model) if site.norm}


def _choose(
    model: nn.Module,
    sites: Sequence[Site],
    by_default: Sequence[Site],
    include: Sequence[str],
    exclude: Sequence[str],
) -> list[Site]:
    for pattern in (*include, *exclude):
        if not any(site.matches([pattern]) for site in sites):
            raise InputError(
                f"The pattern {pattern!r} matches no weight of two or more dimensions in "
                f"{type(model).__name__}; there is {some([site.name for site in sites])}."
            )
    chosen = [site for site in sites if site.matches(include)] if include else by_default
    return [site for site in chosen if not site.matches(exclude)]


def _check_no_computed_weight(model: nn.Module, exclude: Sequence[str]) -> None:
    for path, module in plain_modules(model):
        is_plain = "weight" in module._parameters or parametrize.is_parametrized(module, "weight")
        if isinstance(module, _ConvNd) and not is_plain:
            parts = [WeightPlace(module, path, own).name for own in matrices(module)]
            if not any(matches(part, exclude) for part in parts):
                name = WeightPlace(module, path, "weight").name
                raise InputError(
                    f"{name} is computed from {some(parts)}, as pruning and torch's old "
                    f"weight_norm do it: make it plain first, or exclude {parts[0]!r}."
                )


def _all_sites(model: nn.Module) -> list[Site]:
    sites: dict[int, Site] = {}
    for place in find_places(model):
        parameter = _parameter(place)
        sites.setdefault(id(parameter), Site(parameter)).places.append(place)
    return list(sites.values())


def _parameter(place: WeightPlace) -> nn.Parameter:
    computed = place.parametrizations
    if computed is not None:
        return next(computed.parameters(recurse=False))
    return place.module._parameters[place.attribute]  # type: ignore[return-value]
