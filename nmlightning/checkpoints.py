"""Load a checkpoint of a swapped model without a Trainer."""

from pathlib import Path
from typing import Any, TypeVar

import torch

from nmlightning.recipes import keep_in_checkpoints, note_recipe, recipes_in
from nmlightning.surgery import swap_norms

Module = TypeVar("Module", bound=torch.nn.Module)


def load_from_checkpoint(module_class: type[Module], path: str | Path, **arguments: Any) -> Module:
    """Return the LightningModule of a checkpoint, with its norms swapped as they were in training.

    Its next checkpoints carry the recipe on, also without NormSwap.

    Args:
        module_class: a LightningModule class, of `pytorch_lightning` or `lightning.pytorch`.
        path: the checkpoint, written with or without `save_weights_only`.
        **arguments: handed to `module_class.load_from_checkpoint`: `map_location`, `strict`,
            `weights_only`, and constructor arguments that the checkpoint does not hold, such as
            `net=…`.

    Raises:
        InputError: a recipe of another version of the format, or one that does not fit the model.
    """
    module: Module = module_class.load_from_checkpoint(path, **arguments)  # type: ignore[attr-defined]
    only_weights = arguments.get("weights_only") is not False
    checkpoint = torch.load(path, map_location="cpu", weights_only=only_weights, mmap=True)
    for recipe in recipes_in(checkpoint):
        modules = recipe.pop("modules")
        swap_norms(module, **recipe)
        note_recipe(module, recipe, modules)
        keep_in_checkpoints(module)
    return module
