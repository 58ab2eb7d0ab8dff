"""Recipes: what was done to a model, as plain data on the module and in its checkpoints.

A checkpoint holds, under the key `nmlightning`,
`{"version": 1, "norm_swaps": [recipe, …], "weight_norms": [recipe, …], "int8": {name: options}}`,
of int8 as `describe_int8` gives it, the recipes in order. A recipe is
the keywords of `swap_norms` or `apply_weight_norm`, in one spelling of those that come to the same,
and under `modules` what became of each module. A swap of which later ones left nothing is not kept,
nor a weight norm that was removed; weight norms, each of other weights, are in the order of those.

The metadata of a state dict also say what each norm is, whoever swapped it: see `describe_norm`.
"""

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from glob import escape
from typing import Any

from torch import nn

from nmlightning.errors import InputError
from nmlightning.int8.ranges import NOTE as INT8_NOTE
from nmlightning.int8.ranges import describe_int8
from nmlightning.name_patterns import plain_name, some
from nmlightning.norms.batch_norm_base import as_plain, describe_norm
from nmlightning.norms.registry import INHERITED_UNLESS_GIVEN, check_kinds, drop_defaults, norm_name
from nmlightning.parametrizations.layers import choose_layers, normalised_weights
from nmlightning.parametrizations.weight_norm import NOTE, Settings

KEY, INT8 = "nmlightning", "int8"
VERSION = 1
_NOTES = "_nmlightning_recipes"
_ACTIONS = "_nmlightning_actions"

Recipe = dict[str, Any]


def register_after(module: nn.Module, method: str, action: Callable[..., Any], key: str) -> None:
    """Make this instance call `action`, with the same arguments, after its `method`.

    Of the actions with one `key` only the latest is called. Partials of bound methods pickle and
    copy with the module; closures would not.
    """
    of_methods = module.__dict__.setdefault(_ACTIONS, {})
    if method not in of_methods:
        of_methods[method] = {}
        call_all = functools.partial(_call_all, getattr(module, method), of_methods[method])
        setattr(module, method, call_all)
    of_methods[method][key] = action


def _call_all(
    original: Callable[..., Any], actions: dict[str, Callable[..., Any]], *args: Any, **kwargs: Any
) -> Any:
    result = original(*args, **kwargs)
    for action in actions.values():
        action(*args, **kwargs)
    return result


def make_recipe(
    norm: str,
    options: Mapping[str, Any],
    kinds: str | Sequence[str],
    include: Iterable[str],
    exclude: Iterable[str],
    types: Mapping[str, str] | None = None,
) -> Recipe:
    """Return the keywords of a swap as plain data, which a checkpoint may hold.

    What comes to the same is equal: options at their default are left out, lists are sorted.
    """
    plain = {option: as_plain(value) for option, value in options.items()}
    recipe = {
        "norm": norm_name(norm),
        "options": drop_defaults(norm, plain),
        "kinds": sorted(set(check_kinds(kinds))),
        "include": sorted(set(include)),
        "exclude": sorted(set(exclude)),
    }
    return {**recipe, "types": dict(sorted(types.items()))} if types else recipe


def make_weight_norm_recipe(
    *,
    include: Collection[str],
    exclude: Iterable[str],
    layers: Sequence[str] | None = None,
    **settings: Any,
) -> Recipe:
    """Return the keywords of `apply_weight_norm` as plain data, those that come to the same equal.

    What does not change the weights is left out.
    """
    plain = asdict(Settings.of(**settings))
    plain["rho"] = "init" if plain["rho"] is None else plain["rho"]
    chosen = {"include": sorted(set(include)), "exclude": sorted(set(exclude))}
    return {**plain, "layers": list(choose_layers(layers, include)), **chosen}


def settings_of(recipe: Recipe) -> Settings:
    return Settings.of(**{name: recipe[name] for name in Settings.__dataclass_fields__})


def _drop_overwritten(recipes: list[Recipe]) -> list[Recipe]:
    """Return the swaps without those whose every module a later one changed.

    What a swap takes over from the layer, such as eps, still shows then, unless it was given anew.
    """
    kept: list[Recipe] = []
    given: dict[str, set[str]] = {}  # later, by module
    for recipe in reversed(recipes):
        modules, lasts = recipe["modules"], INHERITED_UNLESS_GIVEN & recipe["options"].keys()
        if not modules or any(name not in given or lasts - given[name] for name in modules):
            kept.insert(0, recipe)
        given |= {name: given.get(name, set()) | lasts for name in modules}
    return kept


def _is_normalised_so(module: nn.Module, recipe: Recipe) -> bool:
    weights, settings = normalised_weights(module), settings_of(recipe)
    return all(weights.get(name) == settings for name in recipe["modules"])


@dataclass(frozen=True)
class Change:
    """One of the things that are done to a model."""

    key: str  # what its recipes are under in a checkpoint
    callback: str  # the name of what does it in a Trainer
    noun: str  # what it changes
    title: str  # the keyword that an error names its recipes by
    make: Callable[..., Recipe]  # returns a recipe in its one spelling
    tidy: Callable[[list[Recipe]], list[Recipe]]  # drops the recipes that came to nothing
    # Whether a recipe that was followed still is true of a module.
    holds: Callable[[nn.Module, Recipe], bool]


NORM_SWAP = Change(
    key="norm_swaps",
    callback="NormSwap",
    noun="norms",
    title="norm",
    make=make_recipe,
    tidy=_drop_overwritten,
    holds=lambda module, recipe: True,
)
WEIGHT_NORM = Change(
    key="weight_norms",
    callback="WeightNormSwap",
    noun="weight norm",
    title="kind",
    make=make_weight_norm_recipe,
    tidy=lambda recipes: sorted(recipes, key=lambda recipe: sorted(recipe["modules"])),
    holds=_is_normalised_so,
)
CHANGES = (NORM_SWAP, WEIGHT_NORM)


def note_recipe(
    module: nn.Module, recipe: Recipe, modules: Mapping[str, Any], change: Change
) -> None:
    """Remember on `module` what `recipe` made of which of its modules; once for each.

    The notes are in the order of the changes: a recipe that is followed again, and does something,
    becomes the last. A LightningModule keeps them in its checkpoints.
    """
    if hasattr(module, "on_save_checkpoint"):
        keep_in_checkpoints(module)
    notes = recipes_of(module, change)
    known = next((note for note in notes if keywords_of(note) == recipe), None)
    if known is None:
        notes.append({**recipe, "modules": dict(modules)})
    elif modules:
        notes.remove(known)
        notes.append({**recipe, "modules": {**known["modules"], **modules}})
    module.__dict__[_NOTES] = {**module.__dict__.get(_NOTES, {}), change.key: change.tidy(notes)}


def recipes_of(module: nn.Module, change: Change) -> list[Recipe]:
    """Return what was noted on `module` and is still true, in order."""
    return [recipe for recipe in _notes(module, change) if change.holds(module, recipe)]


def _notes(module: nn.Module, change: Change) -> list[Recipe]:
    return list(module.__dict__.get(_NOTES, {}).get(change.key, ()))


def forget_reverted_swaps(module: nn.Module) -> None:
    """Drop from the notes the norms that are of another class by now, as after a swap by hand.

    Of those that are torch's again, such a swap back is noted where eps shows what was reverted.
    """
    layers = dict(module.named_modules())
    now = {name: type(layer).__name__ for name, layer in layers.items()}
    last, kept = changed_modules(module, NORM_SWAP), []
    reverted = {name for name, cls in last.items() if now.get(name, cls) != cls}
    for recipe in _notes(module, NORM_SWAP):
        made = {k: cls for k, cls in recipe["modules"].items() if k not in reverted}
        if made or not recipe["modules"]:
            kept.append({**recipe, "modules": made})
        back = [x for x in recipe["modules"].keys() & reverted if describe_norm(layers[x]) is None]
        lasts = {k: v for k, v in recipe["options"].items() if k in INHERITED_UNLESS_GIVEN}
        if back and lasts:
            noted = make_recipe("l2", lasts, recipe["kinds"], map(escape, back), ())
            kept.append({**noted, "modules": {name: now[name] for name in back}})
    if _NOTES in module.__dict__:
        tidy = _drop_overwritten(kept)
        module.__dict__[_NOTES] = {**module.__dict__[_NOTES], NORM_SWAP.key: tidy}


def changed_modules(module: nn.Module, change: Change) -> dict[str, Any]:
    """Return what each changed module, by name, was made last."""
    return {
        name: made for recipe in _notes(module, change) for name, made in recipe["modules"].items()
    }


def recipes_in(checkpoint: Mapping[str, Any], change: Change) -> list[Recipe]:
    """Return the recipes that a checkpoint holds, or raise InputError for another format."""
    entry = checkpoint.get(KEY)
    if entry is None:
        return []
    if not isinstance(entry, Mapping):
        raise InputError(f"The checkpoint's {KEY!r} entry is a {type(entry).__name__}: damaged.")
    if entry.get("version") != VERSION:
        raise InputError(
            f"The checkpoint's {KEY!r} entry has version {entry.get('version')}, and this release "
            f"reads {VERSION}: install the release that wrote it."
        )
    recipes = entry.get(change.key, ())
    if not all(isinstance(recipe, Mapping) and "modules" in recipe for recipe in recipes):
        raise InputError(
            f"The checkpoint's {KEY!r} entry is damaged: its {change.key} are unreadable."
        )
    return change.tidy(
        [{**change.make(**keywords_of(recipe)), "modules": recipe["modules"]} for recipe in recipes]
    )


def keep_in_checkpoints(module: nn.Module) -> None:
    """Let a LightningModule put its recipes into its checkpoints, and refuse those of another.

    A callback cannot: it is not asked about a checkpoint with `save_weights_only`.
    """
    write, check = (functools.partial(f, module) for f in (write_recipes, check_recipes))
    register_after(module, "on_save_checkpoint", write, key="recipes")
    register_after(module, "on_load_checkpoint", check, key="recipes")


def write_recipes(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    forget_reverted_swaps(module)
    noted: dict[str, Any] = {change.key: recipes_of(module, change) for change in CHANGES}
    noted[INT8] = describe_int8(module)
    if any(noted.values()):
        checkpoint[KEY] = {"version": VERSION, **{key: r for key, r in noted.items() if r}}


def check_recipes(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Raise InputError, naming the first difference, if `module` was changed in another way."""
    for change in CHANGES:
        here = [keywords_of(recipe) for recipe in recipes_of(module, change)]
        there = [keywords_of(recipe) for recipe in recipes_in(checkpoint, change)]
        by_hand = count_norms(norms_in(checkpoint)) if change is NORM_SWAP and not there else ""
        weights = weight_norms_in(checkpoint) if change is WEIGHT_NORM and not there else {}
        if weights and normalised_weights(module) == {
            name: settings_of(note) for name, note in weights.items()
        }:
            continue
        if here != there and not (by_hand and _same(module, checkpoint)):
            ours = count_norms(_norms_of(module))
            what = "them with other options" if ours == by_hand else ours or "none"
            difference = (
                f"{by_hand}, swapped by hand, this run has {what}"
                if by_hand
                else _first_difference(there, here, change)
            )
            if weights:
                difference = f"weight norm by hand on {some(weights, 2)} of other settings"
            raise InputError(
                f"The checkpoint was trained with {difference}. Resume with the same {change.noun},"
                " or start from its weights with load_from_checkpoint."
            )

    _check_int8(describe_int8(module), int8_in(checkpoint))


def _check_int8(here: Mapping[str, Recipe], there: Mapping[str, Recipe]) -> None:
    for name in {**there, **here}:
        of_here, of_there = here.get(name, {}), there.get(name, {})
        for option in {**of_there, **of_here}:
            then, now = of_there.get(option), of_here.get(option)
            if option in ("sync", "swapped_to") or then == now:
                continue
            then, now = (
                f"{option} = {options[option]!r}" if options else "no int8"
                for options in (of_there, of_here)
            )
            raise InputError(
                f"The checkpoint was trained with {then} on {name}, this run has {now}. Resume "
                "with the same Int8Swap, or start from its weights with load_from_checkpoint."
            )


def count_norms(notes: Mapping[str, Recipe]) -> str:
    """Return how many norms of which classes there are, in words."""
    counts = Counter(note["norm"] for note in notes.values())
    return ", ".join(f"{count} {norm}" for norm, count in counts.items())


def norms_in(checkpoint: Mapping[str, Any]) -> dict[str, Recipe]:
    """Return what the metadata of a checkpoint's state dicts say about its norms, by name.

    Lightning's WeightAveraging moves the one that has metadata.
    """
    return {plain_name(name): note for name, note in _notes_in(checkpoint, KEY)}


def weight_norms_in(checkpoint: Mapping[str, Any]) -> dict[str, Recipe]:
    """Return the same of its normalised weights: the settings of each."""
    return {plain_name(f"{x[:-1]}original"): note for x, note in _notes_in(checkpoint, NOTE)}


def int8_in(checkpoint: Mapping[str, Any]) -> dict[str, Recipe]:
    """Return the options of what computes in int8, by name, of a checkpoint, also by its metadata.

    Raises:
        InputError: the checkpoint's entry is damaged.
    """
    entry = checkpoint.get(KEY) or {}
    notes = entry.get(INT8) if isinstance(entry, Mapping) else None
    if notes is None:
        notes = {plain_name(name): note for name, note in _notes_in(checkpoint, INT8_NOTE)}
    if not isinstance(notes, Mapping) or not all(isinstance(x, Mapping) for x in notes.values()):
        raise InputError(f"The checkpoint's {KEY!r} entry is damaged: its {INT8} is unreadable.")
    return {name: dict(note) for name, note in notes.items()}


def _notes_in(checkpoint: Mapping[str, Any], key: str) -> list[tuple[str, Recipe]]:
    states = (checkpoint.get(name) for name in ("current_model_state", "state_dict"))
    pairs = [pair for state in states for pair in getattr(state, "_metadata", {}).items()]
    return [(name, own[key]) for name, own in pairs if own.get(key)]


def is_so(layer: nn.Module, note: Recipe) -> bool:
    """Return whether a norm trains as the note of one says, but for what is its model's own."""
    here = describe_norm(layer)
    return here is not None and _what_trains(here) == _what_trains(note)


def _what_trains(note: Recipe) -> tuple[str, Recipe]:
    options = note["options"].items()
    return note["norm"], {k: value for k, value in options if k not in INHERITED_UNLESS_GIVEN}


def _same(module: nn.Module, checkpoint: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint, whoever swapped its norms, says that they are as in `module`."""
    names = {plain_name(name) for name, _ in module.named_modules()}
    both = [
        {name: _what_trains(note) for name, note in notes.items() if name in names}
        for notes in (_norms_of(module), norms_in(checkpoint))
    ]
    return both[0] == both[1] != {}


def _norms_of(module: nn.Module) -> dict[str, Recipe]:
    found = {plain_name(name): describe_norm(layer) for name, layer in module.named_modules()}
    return {name: note for name, note in found.items() if note}


def _first_difference(there: list[Recipe], here: list[Recipe], change: Change) -> str:
    name = change.callback
    if len(there) != len(here):
        then = f"{name} {_titles(there, change)}" if there else f"no {name}"
        return f"{then}, this run has {_titles(here, change) or f'nothing (no {name})'}"
    old, new, key = next(
        (old, new, key)
        for old, new in zip(there, here, strict=True)
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    )
    return f"{name} {key} = {old.get(key)!r}, this run has {key} = {new.get(key)!r}"


def _titles(recipes: list[Recipe], change: Change) -> str:
    return ", ".join(repr(recipe[change.title]) for recipe in recipes)


def keywords_of(recipe: Recipe) -> Recipe:
    """Return it without what it did to which modules."""
    return {key: value for key, value in recipe.items() if key != "modules"}
