"""What a recording says about the run that made it, and whether another run may follow it."""

import math
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmlightning.compat import global_seed
from nmlightning.errors import InputError
from nmlightning.weights.history import NormHistory

if TYPE_CHECKING:
    import pytorch_lightning as pl


def describe_run(trainer: "pl.Trainer", folder: Path) -> dict[str, Any]:
    """Return seed, world size, optimizers, versions and, where there is one, the config."""
    config = folder / "config.yaml"
    return {
        "seed": global_seed(),
        "world_size": trainer.world_size,
        "optimizers": [
            {"name": type(optimizer).__name__, **_plain(optimizer.defaults)}
            for optimizer in trainer.optimizers
        ],
        "versions": {name: version(name) for name in ("torch", "pytorch-lightning")},
        "config": config.read_text(encoding="utf-8") if config.is_file() else None,
    }


def check_same_run(history: NormHistory, trainer: "pl.Trainer", *, other_run: bool) -> None:
    """Raise InputError if the run lasts longer than the recording, or has another seed or size.

    Args:
        history: the recording; what it does not say is not compared.
        trainer: of the run.
        other_run: let another seed and another number of processes pass.
    """
    recorded = int(history.epochs[-1]) + 1 if len(history) else 0
    epochs = _epochs_of(trainer)
    if epochs is not None and epochs > recorded:
        raise InputError(
            f"The recording covers {recorded} epochs, and the run has {epochs}: record a longer "
            f"run, or set max_epochs to {recorded}."
        )
    here = {"seed": global_seed(), "world_size": trainer.world_size}
    for key, value in here.items():
        there = history.provenance.get(key, value)
        if there != value and not other_run:
            raise InputError(
                f"The recording is of a run with {key} {there}, and this one has {value}; set "
                "other_run to follow it all the same."
            )


def _epochs_of(trainer: "pl.Trainer") -> int | None:
    """Return how many epochs the run will begin, or None if that is not known."""
    limits = [] if trainer.max_epochs in (None, -1) else [trainer.max_epochs]
    batches = trainer.num_training_batches
    counts_steps = trainer.lightning_module.automatic_optimization and math.isfinite(batches)
    if trainer.max_steps >= 0 and counts_steps:
        steps = math.ceil(batches / trainer.accumulate_grad_batches)
        limits.append(math.ceil(trainer.max_steps / steps))
    return min(limits, default=None)


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in options.items()
        if value is None or isinstance(value, bool | int | float | str)
    }
