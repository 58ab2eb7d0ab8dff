"""Compares a checkpoint with a network and its arguments; an error names the first difference."""

import inspect
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import pytorch_lightning as pl

from nmlightning.errors import InputError
from nmlightning.named_code import runs_what_is_not_installed

# Absent from old checkpoints, which torch loads nevertheless.
OPTIONAL_BUFFER = "num_batches_tracked"


def check_same_network(module: pl.LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Refuse another network in a checkpoint than `module.net`, by arguments and by shapes."""
    stored = checkpoint.get(module.CHECKPOINT_HYPER_PARAMS_KEY, {}).get("net")
    _check_arguments(stored, module.hparams.get("net"))
    _check_tensors(checkpoint.get("state_dict", {}), module)


def _check_arguments(stored: Any, current: Any) -> None:
    """Compare two `{class_path, init_args}`, which a network made in Python does not have."""
    if not (isinstance(stored, Mapping) and isinstance(current, Mapping)):
        return
    ours = dict(_flatten("net", current))
    for key, value in _flatten("net", stored):
        if key in ours and ours[key] != value:
            is_path = key.endswith(".class_path")  # of which a class may have several
            if not (is_path and _resolve(ours[key]) is _resolve(str(value)) is not None):
                raise _difference(key, value, ours[key])


def _resolve(class_path: str) -> Any:
    if runs_what_is_not_installed(class_path):
        return None
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):  # the checkpoint's may be gone
        return None


def _check_tensors(stored: Mapping[str, Any], module: pl.LightningModule) -> None:
    if not stored:  # sharded checkpoints bring their tensors later
        return
    ours = module.state_dict()
    for key in stored.keys() & ours.keys():
        if stored[key].shape != ours[key].shape:
            raise _difference(key, tuple(stored[key].shape), tuple(ours[key].shape))
    missing = [key for key in ours if key not in stored and not key.endswith(OPTIONAL_BUFFER)]
    surplus = [key for key in stored if key not in ours]
    if module.strict_loading and (missing or surplus):
        raise InputError(
            f"The checkpoint is from another network: it lacks {_count(missing)} of this run's and "
            f"has {_count(surplus)} that this run lacks. Resume with the model it was made with."
        )


def _flatten(prefix: str, tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(f"{prefix}.{name}", value)
        else:
            yield f"{prefix}.{name}", value


def _count(names: list[str]) -> str:
    return f"{len(names)} tensors ({names[0]}, …)" if names else "no tensor"


def _difference(key: str, checkpoint: Any, this_run: Any) -> InputError:
    return InputError(
        f"{key}: checkpoint {checkpoint}, this run {this_run}. "
        "Resume with the model that the checkpoint was made with, or start without it."
    )


def remember_arguments(task: pl.LightningModule, *plain: str) -> None:
    """Keep the arguments of the constructor that calls this, from which a checkpoint is rebuilt.

    Those that are `plain` data are kept even where Python has given the others as objects.
    """
    caller = inspect.currentframe()
    frame = None if caller is None else caller.f_back
    try:  # LightningCLI describes the arguments as plain data, from which they can be rebuilt
        task.save_hyperparameters("_instantiator", frame=frame)
        task.save_hyperparameters(frame=frame)
    except KeyError:  # Python passes objects, which do not belong into a checkpoint
        task.save_hyperparameters(*plain, frame=frame)
