"""Gains in optimizers that were made before the weights were normalised."""

import gc
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from nmlightning.errors import InputError
from nmlightning.weights.weight_norm.sites import Site

Group = dict[str, Any]


def listed(optimizers: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    """Return one or several optimizers as a list."""
    return [optimizers] if hasattr(optimizers, "param_groups") else list(optimizers)  # type: ignore[list-item]


def homes_of_gains(
    sites: Iterable[Site], optimizers: Sequence[Optimizer]
) -> dict[str, list[Group]]:
    """Return by the name of each weight the parameter groups that its gains belong to.

    Raises:
        InputError: an optimizer that exists, but is not among `optimizers`, moves the weight; it
            would not move the gains.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    homes = {site.name: [g for g in groups if _has(g, site.parameter)] for site in sites}
    given = {id(group) for group in groups}
    strangers = [g for o in _all_optimizers() for g in o.param_groups if id(g) not in given]
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS) and any(
            _has(g, s.parameter) for g in optimizer.param_groups for s in sites
        ):
            raise InputError(
                "LBFGS cannot take gains in that it was not made with: make it afterwards."
            )
    for site in sites:
        if any(_has(group, site.parameter) for group in strangers):
            raise InputError(
                f"An optimizer that exists already moves {site.name}, and it would not move the "
                "gain: hand it over as optimizers=…, or make it afterwards."
            )
    return homes


def live_optimizers(model: nn.Module) -> list[Optimizer]:
    """Return the optimizers that exist and move a parameter of the model."""
    own = set(model.parameters())
    return [
        optimizer
        for optimizer in _all_optimizers()
        if any(q in own for group in optimizer.param_groups for q in group["params"])
    ]


def take_out(gain: Tensor, optimizers: Iterable[Optimizer]) -> None:
    """Let the optimizers forget a gain."""
    for optimizer in optimizers:
        optimizer.state.pop(gain, None)
        for group in optimizer.param_groups:
            kept = [q is not gain for q in group["params"]]
            for key in ("params", "param_names"):
                if key in group:
                    group[key] = [x for x, is_kept in zip(group[key], kept, strict=True) if is_kept]


def put_in(gain: Tensor, name: str, groups: Iterable[Group]) -> None:
    """Let the parameter groups have a gain, under its name where they have names."""
    for group in groups:
        group["params"].append(gain)
        if "param_names" in group:
            group["param_names"].append(name)


def _has(group: Group, parameter: Tensor) -> bool:
    return any(q is parameter for q in group["params"])


def _all_optimizers() -> list[Optimizer]:
    return [x for x in gc.get_objects() if issubclass(type(x), Optimizer)]
