"""The weights of a model that can be normalised, and where in it each one is."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from nmlightning.errors import InputError
from nmlightning.weights.channel_norms import ROWS, ChannelLayout, channel_norms
from nmlightning.weights.plain_name import plain_name


@dataclass(frozen=True, eq=False)
class Site:
    """One weight, and all modules that have it.

    Attributes:
        parameter: the weight.
        places: the modules, with the attribute that it is there; several where it is tied.
        names: its name under each of them, as in `model.named_parameters()`.
        layout: where its output channels are.
        is_conv: whether it is the weight of a convolution.
    """

    parameter: nn.Parameter
    layout: ChannelLayout
    is_conv: bool
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Its first name."""
        return self.names[0]

    @property
    def parametrizations(self) -> ParametrizationList:
        """What computes the weight, if it is parametrized."""
        module, attribute = self.places[0]
        return module.parametrizations[attribute]  # type: ignore[index, return-value]

    def matches(self, patterns: Sequence[str]) -> bool:
        """Return whether a glob pattern is true of one of its names."""
        return any(fnmatchcase(name, pattern) for name in self.names for pattern in patterns)


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
        InputError: a pattern that matches no weight, or none left.
    """
    sites = _all_sites(model)
    chosen = _choose(model, sites, [s for s in sites if include or s.is_conv], include, exclude)
    if not chosen:
        raise InputError(
            f"{type(model).__name__} has no weight to normalise: by default these are the "
            f"convolutions; name others by include. It has {_some([s.name for s in sites])}."
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
    sites = [site for site in _all_sites(model) if "WeightNorm" in _parametrizations(site)]
    chosen = _choose(model, sites, sites, include, exclude)
    if not chosen:
        raise InputError(f"{type(model).__name__} has no normalised weight.")
    for site in chosen:
        if len(_parametrizations(site)) > 1:
            kinds = ", ".join(_parametrizations(site))
            raise InputError(f"{site.name} has several parametrizations ({kinds}).")
    return chosen


def normalised_weights(model: nn.Module) -> dict[str, Any]:
    """Return the settings of each weight that is normalised, by its name."""
    sites = [site for site in _all_sites(model) if "WeightNorm" in _parametrizations(site)]
    return {
        site.name: next(x.settings for x in site.parametrizations if hasattr(x, "settings"))
        for site in sites
    }


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
                f"{type(model).__name__}; there is {_some([site.name for site in sites])}."
            )
    chosen = [site for site in sites if site.matches(include)] if include else by_default
    return [site for site in chosen if not site.matches(exclude)]


def _all_sites(model: nn.Module) -> list[Site]:
    sites: dict[int, Site] = {}
    for owner, path, attribute, parameter in _all_weights(model):
        is_conv = isinstance(owner, _ConvNd) and attribute == "weight"
        transposed = is_conv and isinstance(owner, _ConvTransposeNd)
        layout = ChannelLayout(owner.groups) if transposed else ROWS  # type: ignore[arg-type]
        site = sites.setdefault(id(parameter), Site(parameter, layout, is_conv))
        site.places.append((owner, attribute))
        site.names.append(plain_name(f"{path}.{attribute}".lstrip(".")))
    return list(sites.values())


def _all_weights(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Parameter]]:
    """Yield the module, its path, the attribute and the parameter of each that may be a weight."""
    for path, module in model.named_modules():
        if isinstance(module, ParametrizationList):
            owner_path, _, attribute = path.rpartition(".parametrizations.")
            owner_path = owner_path if attribute else ""
            owner = model.get_submodule(owner_path)
            yield owner, owner_path, path.rpartition(".")[2], next(module.parameters(recurse=False))
        elif "parametrizations" not in path.split("."):
            for attribute, parameter in module.named_parameters(recurse=False):
                if is_lazy(parameter) or parameter.dim() >= 2 or _is_flat(parameter):
                    yield module, path, attribute, parameter


def _is_flat(parameter: Tensor) -> bool:
    return bool(getattr(parameter, "_is_flat_param", False))


def check_site(site: Site) -> None:
    """Raise InputError, naming the reason, if a weight cannot be normalised."""
    reason = _refusal(site)
    if reason:
        raise InputError(f"{site.name} {reason}")


def _refusal(site: Site) -> str | None:
    parameter = site.parameter
    if _parametrizations(site):
        return _of_parametrized(site)
    if is_lazy(parameter) or parameter.is_meta:
        return "has no values yet: initialise the model first (with a batch, if it is lazy)."
    if _is_flat(parameter) or type(parameter).__name__ == "DTensor":
        return (
            "is sharded already: call apply_weight_norm, or let WeightNormSwap, before FSDP "
            "wraps the model (in configure_model before fully_shard)."
        )
    if not parameter.is_floating_point():
        return f"is of {parameter.dtype}, and only real floating-point weights have a norm here."
    return _of_norms(site)


def _parametrizations(site: Site) -> list[str]:
    """Return the class names of what computes the weight."""
    if not parametrize.is_parametrized(*site.places[0]):
        return []
    return [type(x).__name__ for x in site.parametrizations]


def _of_parametrized(site: Site) -> str:
    kinds = _parametrizations(site)
    if "WeightNorm" in kinds:
        return "is normalised already; remove_weight_norm undoes that."
    return f"has a parametrization already ({', '.join(kinds)}); remove it first."


def _of_norms(site: Site) -> str | None:
    norms = channel_norms(site.parameter, math.inf, site.layout)
    if not norms.isfinite().all():
        return "has values that are not finite."
    zero = (norms == 0).nonzero().flatten().tolist()
    spared = {getattr(module, "padding_idx", None) for module, _ in site.places}
    zero = [channel for channel in zero if channel not in spared]
    if not zero:
        return None
    shown = ", ".join(map(str, zero[:5])) + (", …" if len(zero) > 5 else "")
    return (
        f"has {len(zero)} of {len(norms)} channels that are zero ({shown}), which have no "
        "direction: initialise the model first, and normalise its weights then."
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8]) or "none"
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")
