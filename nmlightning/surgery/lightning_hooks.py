"""Says in words what Lightning leaves out where it loads the checkpoint of a changed model itself.

`Lit.load_from_checkpoint`, and a Trainer without our callbacks, call nothing of this package: two
of Lightning's functions are wrapped, once, and the one that refuses two callbacks of one name, and
the one that starts workers. A release that has not got them says what Lightning says.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn

from nmlightning.errors import InputError
from nmlightning.name_patterns import plain_name, some
from nmlightning.norms.batch_norm_base import describe_norm
from nmlightning.surgery.recipes import (
    NORM_SWAP,
    WEIGHT_NORM,
    count_norms,
    int8_in,
    is_so,
    norms_in,
    recipes_in,
    weight_norms_in,
)

LEFT_OUT = "The checkpoint was trained with "
_OURS = ("NormSwap", "WeightNormSwap", "Int8Swap", "WeightNormTracker")


def watch_loading() -> None:
    """Wrap what loads checkpoints in each of Lightning's packages that is imported."""
    for package in ("pytorch_lightning", "lightning.pytorch"):
        connector = sys.modules.get(f"{package}.trainer.connectors.checkpoint_connector")
        callbacks = sys.modules.get(f"{package}.trainer.connectors.callback_connector")
        launchers = sys.modules.get(f"{package}.strategies.launchers.multiprocessing")
        _wrap(getattr(launchers, "_MultiProcessingLauncher", None), "launch", _launch)
        _wrap(sys.modules.get(f"{package}.core.saving"), "_load_state", _load_state)
        _wrap(callbacks, "_validate_callbacks_list", _check_callbacks)
        _wrap(getattr(connector, "_CheckpointConnector", None), "restore_model", _restore_model)


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name, None)
    if original is None or hasattr(original, "_nmlightning_original"):
        return

    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    call._nmlightning_original = original  # type: ignore[attr-defined]
    setattr(owner, name, call)


def _check_callbacks(original: Any, callbacks: Sequence[Any]) -> None:
    """Raise InputError for two of our callbacks that only a state key of Lightning's could name."""
    keys = [x.state_key for x in callbacks if type(x).__name__ in _OURS]
    for key in keys:
        if keys.count(key) > 1:
            raise InputError(
                f"The Trainer has {keys.count(key)} {key.partition('{')[0]} of the same settings, "
                "which do the same to the same weights: leave one out, or give it another include."
            )
    original(callbacks)


def _launch(original: Any, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
    """Let callbacks refuse before there are workers, whose tracebacks would come first."""
    for callback in getattr(trainer, "callbacks", ()):
        if hasattr(callback, "check_launch"):
            callback.check_launch(trainer, trainer.lightning_module)
    return original(*args, trainer=trainer, **kwargs)


def _load_state(original: Any, cls: type, checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
    way_out = "load it by nmlightning.load_from_checkpoint."
    with _weights_in_words(checkpoint, way_out):
        loaded = original(cls, checkpoint, *args, **kwargs)
    if isinstance(loaded, nn.Module) and (left := _find_left_norms(loaded, checkpoint)):
        _warn(f"{left}: {way_out}")
    return loaded


def _restore_model(original: Any, connector: Any) -> None:
    trainer, checkpoint = connector.trainer, getattr(connector, "_loaded_checkpoint", {})
    with _weights_in_words(checkpoint, "add {} to the Trainer's callbacks."):
        original(connector)
    if left := _find_left_norms(trainer.lightning_module, checkpoint):
        _warn(f"{left}: add NormSwap to the Trainer's callbacks.")
    # Lightning would name what is missing by the raw keys.
    states, here = checkpoint.get("callbacks") or {}, {c.state_key for c in trainer.callbacks}
    for key in [key for key in states if str(key).partition("{")[0] in _OURS and key not in here]:
        del states[key]
        if trainer.state.fn == "fit" and key.startswith("WeightNormTracker"):
            _warn(
                f"{LEFT_OUT}a WeightNormTracker, which this run lacks: it records no norms and no "
                "rule steers. Add WeightNormTracker to the Trainer's callbacks."
            )


@contextmanager
def _weights_in_words(checkpoint: Mapping[str, Any], way_out: str) -> Iterator[None]:
    """Raise InputError in place of torch's where only the checkpoint has weight norm or int8."""
    try:
        yield
    except RuntimeError as error:
        in_int8 = int8_in(checkpoint)
        if in_int8 and re.search(r"Unexpected key.*\.running_min\b", str(error)):
            raise InputError(
                f"{LEFT_OUT}int8 on {some(in_int8, 2)}, and here there is none: "
                + way_out.format("Int8Swap")
            ) from error
        if not re.search(r"Unexpected key.*\.parametrizations\.", str(error)):
            raise
        weights = [x for recipe in recipes_in(checkpoint, WEIGHT_NORM) for x in recipe["modules"]]
        weights = weights or [*weight_norms_in(checkpoint)]
        if not weights:  # by torch's, or by hand in an older release
            ends = re.compile(r"\.parametrizations\.([^.]+)\.original0?$")
            weights = [ends.sub(r".\1", x) for x in checkpoint["state_dict"] if ends.search(x)]
            way_out = "normalise them in its __init__, as where it was trained."
        raise InputError(
            f"{LEFT_OUT}weight norm on {some(weights, 2)}, and here there is none: "
            + way_out.format("WeightNormSwap")
        ) from error


def _find_left_norms(module: nn.Module, checkpoint: Mapping[str, Any]) -> str | None:
    """Return in words which norms of a checkpoint are others in a module, if any."""
    layers = {plain_name(name): x for name, x in module.named_modules(remove_duplicate=False)}
    notes = norms_in(checkpoint) or _norms_of_recipes(checkpoint)
    left = [
        name
        for name, note in notes.items()
        if name in layers
        and not (is_so(layers[name], note) if "options" in note else describe_norm(layers[name]))
    ]
    if not left:
        return None
    notes = {x: {"norm": _class_on(layers.get(x), note["norm"])} for x, note in notes.items()}
    norms = count_norms(notes)
    here, there = type(layers[left[0]]).__name__, notes[left[0]]["norm"]
    here = f"{here} of other options" if here == there else f"{here}, not {there}"
    return f"{LEFT_OUT}{norms}; {len(left)} of them not here ({left[0]} is {here})"


def _class_on(layer: nn.Module | None, norm: str) -> str:
    """Return the class that a swap makes of a layer: of timm's LayerNorm2d, L1LayerNorm2d."""
    cls = type(layer)
    if layer is None or cls.__module__.startswith("torch.") or describe_norm(layer):
        return norm
    return re.sub("(Batch|Layer|RMS)Norm.*$", "", norm) + cls.__name__


def _norms_of_recipes(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the classes of norms where no state dict says it, as those of older releases."""
    made: dict[str, dict[str, Any]] = {}
    for recipe in recipes_in(checkpoint, NORM_SWAP):
        for name, cls in recipe["modules"].items():
            made.pop(name, None) if recipe["norm"] == "l2" else made.update({name: {"norm": cls}})
    return made


def _warn(message: str) -> None:
    from lightning_utilities.core.rank_zero import rank_zero_warn  # which Lightning has brought

    rank_zero_warn(message)
