"""Load a checkpoint of a changed model without a Trainer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from nmlightning.recipes import (
    WEIGHT_NORM,
    Recipe,
    keep_in_checkpoints,
    note_recipe,
    recipes_in,
)
from nmlightning.surgery import swap_norms
from nmlightning.weights.weight_norm import apply_weight_norm

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
    weight_norms = recipes_in(checkpoint, WEIGHT_NORM)
    with _before_weights_are_loaded(module_class, lambda m: _normalise(m, weight_norms)):
        module: Module = module_class.load_from_checkpoint(path, **arguments)  # type: ignore[attr-defined]
    for recipe in recipes_in(checkpoint):
        modules = recipe.pop("modules")
        swap_norms(module, **recipe)
        note_recipe(module, recipe, modules)
        keep_in_checkpoints(module)
    return module


@contextmanager
def _before_weights_are_loaded(
    module_class: type[nn.Module], action: Callable[[nn.Module], None]
) -> Iterator[None]:
    """Call `action` with each object of the class, and of those below it, that loads weights."""
    own = vars(module_class).get("load_state_dict")
    load = module_class.load_state_dict

    def act_and_load(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        action(self)
        return load(self, *args, **kwargs)

    module_class.load_state_dict = act_and_load  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module_class.load_state_dict
        else:
            setattr(module_class, "load_state_dict", own)  # noqa: B010


def _normalise(module: nn.Module, recipes: Sequence[Recipe]) -> None:
    for recipe in recipes:
        keywords = {key: value for key, value in recipe.items() if key != "modules"}
        rho = "init" if recipe["rho"] is None else recipe["rho"]
        apply_weight_norm(module, **{**keywords, "rho": rho})
        note_recipe(module, keywords, recipe["modules"], WEIGHT_NORM)
        keep_in_checkpoints(module)
