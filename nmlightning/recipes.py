"""What was done to a model, as plain data: noted on the module, kept in its checkpoints, compared.

A checkpoint holds, under the key `nmlightning`, `{"version": 1, "norm_swaps": [recipe, …]}` in the
order of the swaps. A recipe is the keywords of `swap_norms`, in one spelling of those that come to
the same, and under `modules` the class that it gave to each module. A recipe of which later ones
left nothing is not kept.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from nmlightning.after_method import run_after
from nmlightning.errors import InputError
from nmlightning.norms.registry import INHERITED_UNLESS_GIVEN, drop_defaults

KEY = "nmlightning"
VERSION = 1
_NOTES = "_nmlightning_norm_swaps"

Recipe = dict[str, Any]


def make_recipe(
    norm: str,
    options: Mapping[str, Any],
    kinds: Iterable[str],
    include: Iterable[str],
    exclude: Iterable[str],
) -> Recipe:
    """Return the keywords of a swap as plain data, which a checkpoint may hold.

    What comes to the same is equal: options at their default are left out, lists are sorted.
    """
    plain = {option: _plain(value) for option, value in options.items()}
    return {
        "norm": norm,
        "options": drop_defaults(norm, plain),
        "kinds": sorted(set(kinds)),
        "include": sorted(set(include)),
        "exclude": sorted(set(exclude)),
    }


def note_recipe(module: nn.Module, recipe: Recipe, modules: Mapping[str, str]) -> None:
    """Remember on `module` which class `recipe` gave to which of its modules; once for each.

    The notes are in the order of the swaps: a recipe that is followed again, and does something,
    becomes the last.
    """
    notes = recipes_of(module)
    known = next((note for note in notes if _keywords(note) == recipe), None)
    if known is None:
        notes.append({**recipe, "modules": dict(modules)})
    elif modules:
        notes.remove(known)
        notes.append({**recipe, "modules": {**known["modules"], **modules}})
    module.__dict__[_NOTES] = _drop_undone(notes)


def recipes_of(module: nn.Module) -> list[Recipe]:
    """Return what was noted on `module`, in order."""
    return list(module.__dict__.get(_NOTES, ()))


def swapped_modules(module: nn.Module) -> dict[str, str]:
    """Return the class that each swapped module was given last, by name."""
    return {
        name: given for recipe in recipes_of(module) for name, given in recipe["modules"].items()
    }


def recipes_in(checkpoint: Mapping[str, Any]) -> list[Recipe]:
    """Return the recipes that a checkpoint holds, or raise InputError for another format."""
    entry = checkpoint.get(KEY)
    if entry is None:
        return []
    if entry.get("version") != VERSION:
        raise InputError(
            f"The checkpoint's {KEY!r} entry has version {entry.get('version')}, and this release "
            f"reads {VERSION}: install the release that wrote it."
        )
    recipes = entry["norm_swaps"]
    return _drop_undone(
        [{**make_recipe(**_keywords(recipe)), "modules": recipe["modules"]} for recipe in recipes]
    )


def keep_in_checkpoints(module: nn.Module) -> None:
    """Let a LightningModule put its recipes into its checkpoints, and refuse those of another.

    A callback cannot: it is not asked about a checkpoint with `save_weights_only`.
    """
    write, check = (functools.partial(f, module) for f in (write_recipes, check_recipes))
    run_after(module, "on_save_checkpoint", write, key="recipes")
    run_after(module, "on_load_checkpoint", check, key="recipes")


def write_recipes(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Put what was noted on `module` into `checkpoint`."""
    if recipes_of(module):
        checkpoint[KEY] = {"version": VERSION, "norm_swaps": recipes_of(module)}


def check_recipes(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Raise InputError, naming the first difference, if `module` was swapped in another way."""
    here = [_keywords(recipe) for recipe in recipes_of(module)]
    there = [_keywords(recipe) for recipe in recipes_in(checkpoint)]
    if here == there:
        return
    raise InputError(
        f"The checkpoint was trained with {_first_difference(there, here)}. Resume with the same "
        "norms, or start from its weights with load_from_checkpoint."
    )


def _first_difference(there: list[Recipe], here: list[Recipe]) -> str:
    if len(there) != len(here):
        then = f"NormSwap {_names(there)}" if there else "no NormSwap"
        return f"{then}, this run has {_names(here) or 'nothing (no NormSwap)'}"
    old, new, key = next(
        (old, new, key)
        for old, new in zip(there, here, strict=True)
        for key in old
        if old[key] != new[key]
    )
    return f"NormSwap {key} = {old[key]!r}, this run has {key} = {new[key]!r}"


def _names(recipes: list[Recipe]) -> str:
    return ", ".join(repr(recipe["norm"]) for recipe in recipes)


def _keywords(recipe: Recipe) -> Recipe:
    return {key: value for key, value in recipe.items() if key != "modules"}


def _drop_undone(recipes: list[Recipe]) -> list[Recipe]:
    """Return the recipes without those whose every module a later one changed.

    One that set what a swap takes over from the layer, such as eps, still shows then.
    """
    kept: list[Recipe] = []
    changed: set[str] = set()
    for recipe in reversed(recipes):
        modules = set(recipe["modules"])
        lasts = INHERITED_UNLESS_GIVEN & recipe["options"].keys()
        if lasts or not modules or modules - changed:
            kept.insert(0, recipe)
        changed |= modules
    return kept


def _plain(value: Any) -> Any:
    plain = value is None or isinstance(value, bool | int | float)
    return value if plain else str(value).removeprefix("torch.")
