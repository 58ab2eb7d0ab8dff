"""An optimizer and its schedule from what a config or Python gives."""

from typing import Any, Literal

from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from nmlightning.errors import InputError

Interval = Literal["step", "epoch"]


def make_optimizer(make: OptimizerCallable, groups: list[dict[str, Any]]) -> Optimizer:
    """Return the optimizer of the parameter groups, or raise InputError for what it refuses."""
    try:
        return make(groups)
    except ValueError as error:  # such as a negative learning rate
        raise InputError(f"optimizer: {error}.") from error


def add_schedule(optimizer: Optimizer, make: LRSchedulerCallable | None, interval: Interval) -> Any:
    """Return what `configure_optimizers` returns: the optimizer and, if there is one, its schedule.

    The schedule moves after each step or epoch. `ReduceLROnPlateau` moves after epochs and watches
    its `monitor`, or `val/loss`.
    """
    if make is None:
        return optimizer
    try:
        scheduler = make(optimizer)
    except ValueError as error:
        raise InputError(f"lr_scheduler: {error}.") from error
    plateau = isinstance(scheduler, ReduceLROnPlateau)
    schedule = {
        "scheduler": scheduler,
        "interval": "epoch" if plateau else interval,
        "monitor": getattr(scheduler, "monitor", "val/loss"),
    }
    return {"optimizer": optimizer, "lr_scheduler": schedule}
