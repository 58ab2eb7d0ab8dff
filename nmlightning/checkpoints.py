"""Load a checkpoint of a changed model without a Trainer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from nmlightning.recipes import (
    NORM_SWAP,
    WEIGHT_NORM,
    Recipe,
    keep_in_checkpoints,
    keywords_of,
    note_recipe,
    recipes_in,
    recipes_of,
    settings_of,
)
from nmlightning.surgery import swap_norms
from nmlightning.weights.plain_name import plain_name
from nmlightning.weights.weight_norm.apply import prepare_for_weights

Module = TypeVar("Module", bound=torch.nn.Module)


def load_from_checkpoint(module_class: type[Module], path: str | Path, **arguments: Any) -> Module:
    """Return the LightningModule of a checkpoint, with norms and weights as they were in training.

    Its norms are swapped, its weights normalised, as the checkpoint says. Its next checkpoints
    carry that on, also without the callbacks.

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
        swap_norms(module, **recipe)
        note_recipe(module, recipe, modules, NORM_SWAP)
        keep_in_checkpoints(module)
    return module


@contextmanager
def _normalising_first(module_class: type[nn.Module], recipes: Sequence[Recipe]) -> Iterator[None]:
    """Let objects of the class follow the recipes before they load weights that are normalised so.

    They cannot when they are built: what they build from other checkpoints is not meant.
    """
    own = vars(module_class).get("load_state_dict")
    load = module_class.load_state_dict

    def normalise_and_load(self: nn.Module, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = {plain_name(key) for key in state_dict if key.endswith(".original")}
        due = [recipe for recipe in recipes if recipe["modules"].keys() <= hidden]
        for recipe in () if recipes_of(self, WEIGHT_NORM) else due:
            _normalise(self, recipe)
        return load(self, state_dict, *args, **kwargs)

    module_class.load_state_dict = normalise_and_load  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module_class.load_state_dict
        else:
            setattr(module_class, "load_state_dict", own)  # noqa: B010


def _normalise(module: nn.Module, recipe: Recipe) -> None:
    prepare_for_weights(module, settings_of(recipe), recipe["include"], recipe["exclude"])
    note_recipe(module, keywords_of(recipe), recipe["modules"], WEIGHT_NORM)
    keep_in_checkpoints(module)
