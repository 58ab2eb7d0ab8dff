"""Loads a checkpoint of a changed model without a Trainer."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from nmlightning.errors import InputError
from nmlightning.name_patterns import plain_name
from nmlightning.named_code import check_named_code
from nmlightning.norms.batch_norm_base import describe_norm
from nmlightning.norms.registry import find_class, path_of
from nmlightning.parametrizations.apply import prepare_for_weights
from nmlightning.surgery.lightning_hooks import LEFT_OUT
from nmlightning.surgery.recipes import (
    NORM_SWAP,
    WEIGHT_NORM,
    Recipe,
    int8_in,
    is_so,
    keywords_of,
    norms_in,
    note_recipe,
    recipes_in,
    recipes_of,
    settings_of,
    weight_norms_in,
)
from nmlightning.surgery.swap import Swap, SwapReport, swap_norms

Module = TypeVar("Module", bound=torch.nn.Module)


def load_from_checkpoint(module_class: type[Module], path: str | Path, **arguments: Any) -> Module:
    """Return the LightningModule of a checkpoint, with norms and weights as they were in training.

    Its norms are swapped and its weights normalised as in the checkpoint, by a callback or by hand.
    Its next checkpoints hold the same recipe, also without the callbacks.

    Args:
        module_class: a LightningModule class, of `pytorch_lightning` or `lightning.pytorch`.
        path: the checkpoint, written with or without `save_weights_only`.
        **arguments: handed to `module_class.load_from_checkpoint`: `map_location`, `strict`,
            `weights_only`, and constructor arguments that the checkpoint does not hold, such as
            `net=…`.

    Raises:
        InputError: a recipe of another version of the format, or one that does not fit the model;
            hyper-parameters that name a class in no installed package and no imported module.
    """
    only_weights = arguments.get("weights_only") is not False
    checkpoint = torch.load(path, map_location="cpu", weights_only=only_weights, mmap=True)
    if "_instantiator" in (stored := checkpoint.get("hyper_parameters", {})):  # makes what it names
        check_named_code({**stored, **arguments}, str(path))
    with _normalising_first(module_class, checkpoint), warnings.catch_warnings():
        warnings.filterwarnings("ignore", LEFT_OUT)  # what follows puts them in
        module: Module = module_class.load_from_checkpoint(path, **arguments)  # type: ignore[attr-defined]
    notes, covered = norms_in(checkpoint), set[str]()
    for recipe in recipes_in(checkpoint, NORM_SWAP):
        modules = recipe.pop("modules")
        report = swap_norms(module, **recipe)
        modules |= {swap.name: swap.after for swap in report.swapped}  # classes as named today
        note_recipe(module, recipe, modules, NORM_SWAP)
        covered |= modules.keys()
    layers = {plain_name(name): x for name, x in module.named_modules(remove_duplicate=False)}
    for name in covered & notes.keys() & layers.keys():
        if is_so(layers[name], notes[name]):  # the rest the model may set otherwise today
            del notes[name]
    _follow(module, notes)
    return module


def swap_like(model: nn.Module, state_dict: Mapping[str, Any]) -> SwapReport:
    """Swap the norms of `model` to those that a state dict was saved with, and report it.

    The metadata of a state dict name the norms of this package, and what computes in int8, which
    then does so here. If there is none, nothing is swapped.

    Args:
        model: a new model, also with other norms.
        state_dict: from `state_dict()` of such a model, or `torch.load` of that.

    Raises:
        InputError: a dict without metadata, such as one that you put together.

    Examples:
        >>> nets = [nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)) for _ in range(2)]
        >>> _ = swap_norms(nets[0], "topk", {"k": 3})
        >>> print(swap_like(nets[1], nets[0].state_dict()))
        swapped 1 BatchNorm2d → TopKBatchNorm2d
    """
    if not hasattr(state_dict, "_metadata"):
        raise InputError(
            "swap_like got a dict without _metadata, which say what the norms are: give what "
            "model.state_dict() returned, or torch.load of that, not a checkpoint or a copy."
        )
    checkpoint = {"state_dict": state_dict}
    int8 = follow_int8(model, int8_in(checkpoint))
    return SwapReport((*_follow(model, norms_in(checkpoint)).swapped, *int8), ())


def _follow(model: nn.Module, notes: Mapping[str, Recipe]) -> SwapReport:
    """Make the norms of a model, by name, what their notes say."""
    layers = {plain_name(name): x for name, x in model.named_modules(remove_duplicate=False)}
    due = {x: note for x, note in notes.items() if x in layers and describe_norm(layers[x]) != note}
    swapped: tuple[Swap, ...] = ()
    for note in {repr(note): note for note in due.values()}.values():
        names = [name for name, other in due.items() if other == note]
        norm, kind = find_class(note["norm"])
        classes = {type(layers[name]) for name in names}
        types = {path_of(getattr(cls, "replaced", cls)): kind for cls in classes}
        include = [escape(name) for name in names]
        swapped += swap_norms(
            model, norm, note["options"], kinds=kind, include=include, types=types
        ).swapped
    return SwapReport(swapped, ())


def follow_int8(model: nn.Module, notes: Mapping[str, Recipe]) -> tuple[Swap, ...]:
    """Let layers and norms compute in int8 as `describe_int8` said of them, by name."""
    if not notes:
        return ()
    from nmlightning.surgery.int8 import follow_notes

    made = {name: note["swapped_to"] for name, note in notes.items() if note.get("swapped_to")}
    _follow(model, made)
    return follow_notes(model, notes)


@contextmanager
def _normalising_first(
    module_class: type[nn.Module], checkpoint: Mapping[str, Any]
) -> Iterator[None]:
    """Let objects of the class normalise weights, as it says, before they load those of it.

    They cannot when they are built: what they build from other checkpoints is not meant. A module
    may compare itself with the checkpoint in `on_load_checkpoint`, and another may not have that.
    """

    recipes, by_hand = recipes_in(checkpoint, WEIGHT_NORM), weight_norms_in(checkpoint)

    def normalise(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
        normalised = {plain_name(key) for key in state_dict if key.endswith(".original")}
        due = [recipe for recipe in recipes if recipe["modules"].keys() <= normalised]
        for recipe in () if recipes_of(module, WEIGHT_NORM) else due:
            names = [escape(name) for name in recipe["modules"]]
            prepare_for_weights(module, settings_of(recipe), names)
            note_recipe(module, keywords_of(recipe), recipe["modules"], WEIGHT_NORM)
        names = [x for x, _ in module.named_parameters(remove_duplicate=False)]
        follow_int8(module, int8_in(checkpoint))
        plain = normalised & {plain_name(x) for x in names if ".parametrizations." not in f".{x}"}
        for settings in {settings_of(by_hand[x]) for x in plain & by_hand.keys()}:
            own = [escape(x) for x in plain & by_hand.keys() if settings_of(by_hand[x]) == settings]
            prepare_for_weights(module, settings, own)

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
