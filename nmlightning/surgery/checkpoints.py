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
from nmlightning.norms.registry import find_class, path_of
from nmlightning.parametrizations.apply import prepare_for_weights
from nmlightning.parametrizations.weight_norm import Settings
from nmlightning.surgery import recipes
from nmlightning.surgery.lightning_hooks import LEFT_OUT
from nmlightning.surgery.swap import Swap, SwapReport, swap_norms

Module = TypeVar("Module", bound=torch.nn.Module)


def load_from_checkpoint(module_class: type[Module], path: str | Path, **arguments: Any) -> Module:
    """Return the LightningModule of a checkpoint, with norms and weights as they were in training.

    Its norms are swapped and its weights normalised as in the checkpoint, by a callback or by hand.
    Its next checkpoints say so, too, also without the callbacks.

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
    _follow(module, recipes.recipe_in(checkpoint, recipes.NORMS))
    if recipes.KEY in checkpoint:
        recipes.keep_in_checkpoints(module)
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
    int8 = follow_int8(model, recipes.recipe_in(checkpoint, recipes.INT8))
    return SwapReport((*_follow(model, recipes.recipe_in(checkpoint, recipes.NORMS)), *int8), ())


def _follow(model: nn.Module, recipe: recipes.Recipe) -> tuple[Swap, ...]:
    """Make the norms of a model what the recipe says, and return what was swapped."""
    layers = {plain_name(name): x for name, x in model.named_modules(remove_duplicate=False)}
    here = {name: recipes.describe_layer(layers[name]) for name in recipe.keys() & layers.keys()}
    due = {name: note for name, note in recipe.items() if here.get(name, note) != note}
    for name in [x for x in due if recipes.what_trains(here[x])["norm"] == "l2"]:
        if recipes.what_trains(due[name])["norm"] == "l2":  # torch's own stays so
            options = due.pop(name)["options"] if here[name] else {}
            vars(layers[name]).update(options)
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
    return swapped


def follow_int8(model: nn.Module, recipe: recipes.Recipe) -> tuple[Swap, ...]:
    """Let layers and norms compute in int8 as the recipe says."""
    if not recipe:
        return ()
    from nmlightning.surgery.int8 import follow_notes

    made = {name: note["swapped_to"] for name, note in recipe.items() if note.get("swapped_to")}
    _follow(model, made)
    return follow_notes(model, recipe)


@contextmanager
def _normalising_first(
    module_class: type[nn.Module], checkpoint: Mapping[str, Any]
) -> Iterator[None]:
    """Let objects of the class have its parameters, as those of normalised weights, before loading.

    They cannot when they are built: what they build from other checkpoints is not meant. A module
    may compare itself with the checkpoint in `on_load_checkpoint`, and another may not have that.
    """
    kinds = (recipes.NORMS, recipes.INT8, recipes.WEIGHTS)
    norms, int8, notes = (recipes.recipe_in(checkpoint, kind) for kind in kinds)
    weights = {name: Settings.of(**note) for name, note in notes.items()}

    def normalise(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
        normalised = {plain_name(key) for key in state_dict if key.endswith(".original")}
        names = [x for x, _ in module.named_parameters(remove_duplicate=False)]
        follow_int8(module, int8)
        _follow(module, {x: norms[x] for x in norms if f"{x}.alpha" in state_dict})
        plain = {plain_name(x) for x in names if ".parametrizations." not in f".{x}"}
        due = {name: weights[name] for name in weights if name in plain & normalised}
        for settings in dict.fromkeys(due.values()):
            own = [escape(name) for name in due if due[name] == settings]
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
