"""Loads a checkpoint of a changed model without a Trainer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from nmlightning.name_patterns import plain_name
from nmlightning.parametrizations.apply import prepare_for_weights
from nmlightning.surgery.recipes import (
    NORM_SWAP,
    WEIGHT_NORM,
    Recipe,
    keywords_of,
    note_recipe,
    recipes_in,
    recipes_of,
    settings_of,
)
from nmlightning.surgery.swap import swap_norms

Module = TypeVar("Module", bound=torch.nn.Module)


def load_from_checkpoint(module_class: type[Module], path: str | Path, **arguments: Any) -> Module:
    """Return the LightningModule of a checkpoint, with norms and weights as they were in training.

    Its norms are swapped, its weights normalised, as the checkpoint says, and its next checkpoints
    say so too, also without the callbacks.

    Args:
        module_class: a LightningModule class, of `pytorch_lightning` or `lightning.pytorch`.
        path: the checkpoint, written with or without `save_weights_only`.
        **arguments: handed to `module_class.load_from_checkpoint`: `map_location`, `strict`,
            `weights_only`, and constructor arguments that the checkpoint does not hold, such as
            `net=…`.

    Raises:
        InputError: a recipe of another version of the format, or one that does not fit the model.
    """
    only_weights = arguments.get("weights_only") is not False
    checkpoint = torch.load(path, map_location="cpu", weights_only=only_weights, mmap=True)
    with _normalising_first(module_class, recipes_in(checkpoint, WEIGHT_NORM)):
        module: Module = module_class.load_from_checkpoint(path, **arguments)  # type: ignore[attr-defined]
    for recipe in recipes_in(checkpoint, NORM_SWAP):
        modules = recipe.pop("modules")
        report = swap_norms(module, **recipe)
        modules |= {swap.name: swap.after for swap in report.swapped}  # classes as named today
        note_recipe(module, recipe, modules, NORM_SWAP)
    return module


@contextmanager
def _normalising_first(module_class: type[nn.Module], recipes: Sequence[Recipe]) -> Iterator[None]:
    """Let objects of the class follow the recipes before they load weights that are normalised so.

    They cannot when they are built: what they build from other checkpoints is not meant. A module
    may compare itself with the checkpoint in `on_load_checkpoint`, and another may not have that.
    """

    def normalise(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
        normalised = {plain_name(key) for key in state_dict if key.endswith(".original")}
        due = [recipe for recipe in recipes if recipe["modules"].keys() <= normalised]
        for recipe in () if recipes_of(module, WEIGHT_NORM) else due:
            names = [escape(name) for name in recipe["modules"]]
            prepare_for_weights(module, settings_of(recipe), names)
            note_recipe(module, keywords_of(recipe), recipe["modules"], WEIGHT_NORM)

    with (
        _before(
            module_class, "on_load_checkpoint", lambda m, c: normalise(m, c.get("state_dict", {}))
        ),
        _before(module_class, "load_state_dict", normalise),
    ):
        yield


@contextmanager
def _before(
    module_class: type[nn.Module], method: str, action: Callable[[nn.Module, Any], None]
) -> Iterator[None]:
    """Call `action` with the object and the first argument before each call of a method."""
    own, call = vars(module_class).get(method), getattr(module_class, method)

    def act_and_call(self: nn.Module, first: Any, *args: Any, **kwargs: Any) -> Any:
        action(self, first)
        return call(self, first, *args, **kwargs)

    setattr(module_class, method, act_and_call)
    try:
        yield
    finally:
        if own is None:
            delattr(module_class, method)
        else:
            setattr(module_class, method, own)
