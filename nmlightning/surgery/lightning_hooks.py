"""Says in words what Lightning leaves out where it loads the checkpoint of a changed model itself.

`Lit.load_from_checkpoint`, and a Trainer without our callbacks, call nothing of this package: two
of Lightning's functions are wrapped, once, and the one that refuses two callbacks of one name, and
the one that starts workers. A release that has not got them says what Lightning says.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn

from nmlightning.errors import InputError
from nmlightning.name_patterns import plain_name, some
from nmlightning.norms.batch_norm_base import describe_norm
from nmlightning.surgery.recipes import INT8, NORMS, WEIGHTS, recipe_in, what_trains

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
        in_int8 = recipe_in(checkpoint, INT8)
        if in_int8 and re.search(r"Unexpected key.*\.running_min\b", str(error)):
            raise InputError(
                f"{LEFT_OUT}int8 on {some(in_int8, 2)}, and here there is none: "
                + way_out.format("Int8Swap")
            ) from error
        if not re.search(r"Unexpected key.*\.parametrizations\.", str(error)):
            raise
        weights = [*recipe_in(checkpoint, WEIGHTS)]
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
    train = {x: what_trains(note) for x, note in recipe_in(checkpoint, NORMS).items()}
    train = {x: note for x, note in train.items() if x in layers and note["norm"] != "l2"}
    here = {x: what_trains(describe_norm(layers[x])) for x in train}
    left = [x for x in train if here[x] != train[x]]
    if not left:
        return None
    counts = Counter(note["norm"] for note in train.values())
    norms = ", ".join(f"{count} {norm}" for norm, count in counts.items())
    is_now, was = here[left[0]]["norm"], train[left[0]]["norm"]
    now = "of other options" if is_now == was else f"{is_now}, not {was}"
    return f"{LEFT_OUT}{norms} norms; {len(left)} of them not here ({left[0]} is {now})"


def _warn(message: str) -> None:
    from lightning_utilities.core.rank_zero import rank_zero_warn  # which Lightning has brought

    rank_zero_warn(message)
