"""Gains in optimizers that were made before the weights were normalised."""

import gc
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from nmlightning.errors import InputError
from nmlightning.parametrizations.layers import NormalisableWeight

Group = dict[str, Any]


def check_optimizers(optimizers: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    """Return one or several optimizers as a list, or raise InputError for anything else."""
    several = [optimizers] if hasattr(optimizers, "param_groups") else optimizers
    found: list[Any] = list(several) if isinstance(several, Iterable) else [several]
    for each in found:
        if not hasattr(each, "param_groups"):
            raise InputError(f"optimizers is an optimizer or a list of them, got {each!r}.")
    return found


def param_groups_for_gains(
    weights: Iterable[NormalisableWeight], optimizers: Sequence[Optimizer]
) -> dict[str, list[Group]]:
    """Return by the name of each weight the parameter groups that its gains belong to."""
    given = {id(optimizer) for optimizer in optimizers}
    other_optimizers = [x for x in _all_optimizers() if id(x) not in given]
    groups = {}
    for weight in weights:
        if any(_groups_with(weight.parameter, [x]) for x in optimizers if isinstance(x, LBFGS)):
            raise InputError(
                "LBFGS cannot add gains later: make it after the weights are normalised."
            )
        if _groups_with(weight.parameter, other_optimizers):
            raise InputError(
                f"An existing optimizer trains {weight.name} and would not train its gain: give it "
                "as optimizers=…, or make it afterwards."
            )
        groups[weight.name] = _groups_with(weight.parameter, optimizers)
    return groups


def add_to_param_groups(gain: Tensor, name: str, groups: Iterable[Group]) -> None:
    """Add a gain to the parameter groups, under its name where they have names."""
    for group in groups:
        group["params"].append(gain)
        if "param_names" in group:
            group["param_names"].append(name)


def remove_from_optimizers(gains: Sequence[Tensor]) -> None:
    """Remove the gains, and their state, from every optimizer."""
    for optimizer in _all_optimizers() if gains else ():
        for gain in gains:
            optimizer.state.pop(gain, None)
            for group in _groups_with(gain, [optimizer]):
                kept = [q is not gain for q in group["params"]]
                for key in {"params", "param_names"} & group.keys():
                    group[key] = [x for x, k in zip(group[key], kept, strict=True) if k]


def live_optimizers(model: nn.Module) -> list[Optimizer]:
    """Return the optimizers that exist and move a parameter of the model."""
    return [x for x in _all_optimizers() if any(_groups_with(q, [x]) for q in model.parameters())]


def _groups_with(parameter: Tensor, optimizers: Iterable[Optimizer]) -> list[Group]:
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    return [group for group in groups if any(q is parameter for q in group["params"])]


def _all_optimizers() -> list[Optimizer]:
    """Return every optimizer that is alive; only the garbage collector knows all of them."""
    return [x for x in gc.get_objects() if issubclass(type(x), Optimizer)]
