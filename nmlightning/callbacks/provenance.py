"""Provenance of a recording: the run that made it, compared with a run that follows it."""

import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from torch.optim import Optimizer

from nmlightning.callbacks.epoch_clock import steps_per_epoch
from nmlightning.compat import epochs_to_train, global_seed
from nmlightning.errors import InputError
from nmlightning.name_patterns import some
from nmlightning.weights.history import NormHistory

_ROUNDING = 1e-9  # of a number of epochs that is no whole one


def describe_run(trainer: pl.Trainer, folder: Path) -> dict[str, Any]:
    """Return seed, world size, steps per epoch, optimizers, versions and, if it has one, config."""
    config = folder / "config.yaml"
    return {
        "seed": global_seed(),
        "world_size": trainer.world_size,
        "steps_per_epoch": steps_per_epoch(trainer),
        "optimizers": [
            {"name": type(optimizer).__name__, **_plain(optimizer.defaults)}
            for optimizer in trainer.optimizers
        ],
        "versions": {name: version(name) for name in ("torch", "pytorch-lightning")},
        "config": config.read_text(encoding="utf-8") if config.is_file() else None,
    }


def check_same_run(history: NormHistory, trainer: pl.Trainer, *, other_run: bool) -> None:
    """Raise InputError if the run lasts longer than the recording, or has another seed or size.

    What is not noted in the recording is not compared. `other_run` lets another seed and another
    number of processes pass.
    """
    recorded, epochs = history.clock.covered, _epochs_of(trainer, history)
    if epochs is not None and epochs > recorded + _ROUNDING:
        shorter = f", or set max_epochs to {int(recorded)}" if recorded >= 1 else ""
        raise InputError(
            f"The recording covers {recorded:.4g} epochs, and the run has {epochs:.4g}: record a "
            f"longer run{shorter}."
        )
    here = {"seed": global_seed(), "world_size": trainer.world_size}
    for key, value in here.items():
        there = history.provenance.get(key, value)
        if there != value and not other_run:
            raise InputError(
                f"The recording is of a run with {key} {there}, and this one has {value}; set "
                "other_run to follow it all the same."
            )


def _epochs_of(trainer: pl.Trainer, history: NormHistory) -> float | None:
    """Return how many epochs the run will have, or None if it has no limit.

    Epochs of unknown length are taken to be as long as those of the recording.
    """
    most = epochs_to_train(trainer)
    limits = [] if most is None else [float(most)]
    if trainer.max_steps >= 0 and len(history):
        recorded = history.clock.length_of(int(history.epochs[-1]))
        limits.append(trainer.max_steps / (steps_per_epoch(trainer) or max(recorded, 1)))
    return min(limits, default=None)


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in options.items()
        if value is None or isinstance(value, bool | int | float | str)
    }


def check_same_optimizer(
    history: NormHistory, names: Sequence[str], optimizers: Sequence[Optimizer]
) -> None:
    """Compare optimizers, learning rates and decays with those of a recording, where it has them.

    A warning names another learning rate, and a recording without weight decay of the weights that
    follow it, which have these `names`.

    Raises:
        InputError: an optimizer of a class that the recorded run did not have.
    """
    recorded = history.provenance.get("optimizers") or []
    names_there = [each.get("name") for each in recorded]
    for optimizer in optimizers:
        name, rate = type(optimizer).__name__, float(optimizer.defaults["lr"])
        if names_there and name not in names_there:
            raise InputError(
                f"The recording is of a run with {' and '.join(map(str, names_there))}, and this "
                f"one has {name}, whose steps follow norms otherwise; set other_run to follow it "
                "all the same."
            )
        rates = [each["lr"] for each in recorded if each.get("name") == name and "lr" in each]
        if rates and rate not in rates:
            _warn(f"with learning rate {rates[0]:g}, and this one has {rate:g}")
    columns = [list(history.norms).index(name) for name in names]
    decays = history.weight_decays[:, columns]
    if decays.size and not np.isnan(decays).any() and not decays.any():
        _warn(f"without weight decay on {some(names, 3)}, so there is none to replace")


def _warn(difference: str) -> None:
    warnings.warn(
        f"The recording is of a run {difference}; set other_run if that is meant.", stacklevel=2
    )
