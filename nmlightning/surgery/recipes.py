"""Recipes: what the norms, weights and layers of a model are, as plain data in its checkpoints.

A checkpoint holds, under the key `nmlightning`,
`{"version": 2, "norms": recipe, "weights": recipe, "int8": recipe}`, of each norm, each normalised
weight and each module in int8. A recipe is `{name: note}`, as they are when it is saved, whoever
made them so. The metadata of a state dict hold the same notes of what is of this package.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from nmlightning.errors import InputError
from nmlightning.int8.ranges import NOTE as INT8_NOTE
from nmlightning.int8.ranges import describe_int8
from nmlightning.name_patterns import plain_name
from nmlightning.norms.batch_norm_base import as_plain, default_options, describe_norm
from nmlightning.norms.registry import NORMS as NORMS_BY_NAME
from nmlightning.norms.registry import check_options, find_class, layer_class
from nmlightning.parametrizations.layers import normalised_weights
from nmlightning.parametrizations.weight_norm import NOTE, Settings

KEY = "nmlightning"
VERSION = 2
NORMS, WEIGHTS, INT8 = "norms", "weights", "int8"
_ACTIONS = "_nmlightning_actions"
_METADATA = {NORMS: KEY, WEIGHTS: NOTE, INT8: INT8_NOTE}
_CALLBACKS = {NORMS: "NormSwap", WEIGHTS: "WeightNormSwap", INT8: "Int8Swap"}
_TORCHS = {*NORMS_BY_NAME["l2"].batch.values(), nn.LayerNorm, nn.RMSNorm}
# Options of a norm that it may have from its model, which a resume may set otherwise.
_OF_THE_MODEL = {"eps", "momentum", "sync"}

Note = dict[str, Any]
Recipe = dict[str, Note]


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


def keep_in_checkpoints(module: nn.Module) -> None:
    """Let a LightningModule put its recipes into its checkpoints, and refuse those of another.

    A callback cannot: it is not asked about a checkpoint with `save_weights_only`.
    """
    if hasattr(module, "on_save_checkpoint"):
        write, check = (functools.partial(f, module) for f in (write_recipes, check_recipes))
        register_after(module, "on_save_checkpoint", write, key="recipes")
        register_after(module, "on_load_checkpoint", check, key="recipes")


def write_recipes(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    noted = _describe(module)
    if any(noted.values()):
        checkpoint[KEY] = {"version": VERSION, **noted}


def _describe(module: nn.Module, known: Collection[str] = ()) -> dict[str, Recipe]:
    """Return the recipes of a module. A tied weight is under its first name, and any `known`."""
    layers = module.named_modules(remove_duplicate=False)
    norms = {plain_name(name): describe_layer(layer) for name, layer in layers}
    weights = normalised_weights(module, known)
    return {  # int8 first, of whose norms the other may be a difference, too
        INT8: describe_int8(module),
        NORMS: {name: note for name, note in norms.items() if note},
        WEIGHTS: {name: settings.as_plain() for name, settings in weights.items()},
    }


def describe_layer(layer: nn.Module) -> Note | None:
    """Return what `describe_norm` says, and the eps of torch's norms and what is made of them."""
    torchs = next((cls for cls in type(layer).__mro__ if cls in _TORCHS), None)
    if (note := describe_norm(layer)) is not None or torchs is None:
        return note
    return {"norm": torchs.__name__, "options": {"eps": as_plain(layer.eps)}}


def what_trains(note: Note | None) -> Note:
    """Return the norm of a note, `l2` of none, and its options but for what is its model's own."""
    norm, kind = find_class(note["norm"]) if note else ("l2", "batch")
    if note is None or norm == "l2":
        return {"norm": "l2"}
    options = {**default_options(layer_class(norm, kind)), **note["options"]}
    return {"norm": norm, **{k: v for k, v in options.items() if k not in _OF_THE_MODEL}}


def check_recipes(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Raise InputError, naming the first difference, if `module` was changed in another way.

    A module that keeps none, against a checkpoint that says nothing, may be as it was.
    """
    noted = _describe(module, recipe_in(checkpoint, WEIGHTS))
    is_known = KEY in checkpoint or "on_load_checkpoint" in vars(module).get(_ACTIONS, {})
    for kind, here in noted.items():
        there = recipe_in(checkpoint, kind)
        for name in {**there, **here} if there or is_known else ():
            then, now = (_compared(kind, notes.get(name)) for notes in (there, here))
            option = next((x for x in {**then, **now} if then.get(x) != now.get(x)), None)
            if option is not None:
                none = f"no {'int8' if kind == INT8 else 'weight norm'}"
                old, new = (f"{option} = {x.get(option)!r}" if x else none for x in (then, now))
                raise InputError(
                    f"The checkpoint was trained with {old} on {name}, this run has {new}. Resume "
                    f"with the same {_CALLBACKS[kind]}, or start from its weights with "
                    "load_from_checkpoint."
                )


def _compared(kind: str, note: Note | None) -> Note:
    if kind == NORMS:
        return what_trains(note)
    return {k: v for k, v in (note or {}).items() if k not in ("sync", "swapped_to")}


def recipe_in(checkpoint: Mapping[str, Any], kind: str) -> Recipe:
    """Return a recipe of a checkpoint: its entry's, else what the metadata of its tensors say.

    Raises:
        InputError: the entry is damaged, or of another version.
    """
    entry = checkpoint.get(KEY, {"version": VERSION})
    if not isinstance(entry, Mapping):
        raise InputError(f"The checkpoint's {KEY!r} entry is a {type(entry).__name__}: damaged.")
    if entry.get("version") not in (1, VERSION):
        raise InputError(
            f"The checkpoint's {KEY!r} entry has version {entry.get('version')}, and this release "
            f"reads 1 and {VERSION}: install the release that wrote it."
        )
    try:
        recipe = entry[kind] if kind in entry else _recipe_in_metadata(checkpoint, kind)
        recipe = recipe or _translate(entry, kind)
        return {name: {**note} for name, note in recipe.items()}
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise InputError(
            f"The checkpoint's {KEY!r} entry is damaged: its {kind} are unreadable."
        ) from error


def _recipe_in_metadata(checkpoint: Mapping[str, Any], kind: str) -> Recipe:
    """Return the same of the state dicts; Lightning's WeightAveraging moves the one with them."""
    states = (checkpoint.get(name) for name in ("current_model_state", "state_dict"))
    pairs = [pair for state in states for pair in getattr(state, "_metadata", {}).items()]
    return {
        plain_name(f"{name[:-1]}original" if kind == WEIGHTS else name): own[_METADATA[kind]]
        for name, own in pairs
        if own.get(_METADATA[kind])
    }


def _translate(entry: Mapping[str, Any], kind: str) -> Recipe:
    """Return what the swaps that version 1 lists, with their keywords and modules, came to."""
    recipe: Recipe = {}
    for swap in entry.get("norm_swaps", ()) if kind == NORMS else ():
        for name, made in swap["modules"].items():
            of = next((x for x in swap["kinds"] if x in made.lower()), swap["kinds"][0])
            last = recipe.get(name, {"options": {}})["options"]
            options = {k: v for k, v in last.items() if k in _OF_THE_MODEL}  # these outlive a swap
            options |= check_options(swap["norm"], of, swap["options"])
            recipe[name] = {"norm": layer_class(swap["norm"], of).__name__, "options": options}
    for swap in entry.get("weight_norms", ()) if kind == WEIGHTS else ():
        settings = Settings.of(**{name: swap[name] for name in Settings.__dataclass_fields__})
        recipe |= dict.fromkeys(swap["modules"], settings.as_plain())
    return recipe
