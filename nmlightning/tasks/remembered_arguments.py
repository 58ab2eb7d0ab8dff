"""The arguments of a task, in its checkpoints."""

import inspect

import pytorch_lightning as pl


def remember_arguments(task: pl.LightningModule, *plain: str) -> None:
    """Keep the arguments of the constructor that calls this, from which a checkpoint is rebuilt.

    Args:
        task: what is being constructed.
        plain: the arguments that are plain data, also where Python has given the others as objects.
    """
    caller = inspect.currentframe()
    frame = None if caller is None else caller.f_back
    try:  # LightningCLI describes the arguments as plain data, from which they can be rebuilt
        task.save_hyperparameters("_instantiator", frame=frame)
        task.save_hyperparameters(frame=frame)
    except KeyError:  # Python passes objects, which do not belong into a checkpoint
        task.save_hyperparameters(*plain, frame=frame)
