"""Optimizers and schedules from a config or Python, and the linear scaling rule."""

from typing import Any, Literal

import pytorch_lightning as pl
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.utilities.rank_zero import rank_zero_info
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


class FoundLearningRate:
    """The attribute `lr` of a task, which Lightning's LearningRateFinder looks for and sets.

    It is the rate of all parameter groups, as found with batches of the run's size, and None as
    long as that of the optimizer holds. Schedules that exist go by it from then on.
    """

    def __get__(self, task: Any, owner: type | None = None) -> Any:
        return self if task is None else task.__dict__.get("_found_lr")

    def __set__(self, task: Any, lr: float | None) -> None:
        task.__dict__["_found_lr"] = lr
        for config in task._trainer.lr_scheduler_configs if task._trainer and lr else ():
            for scheduler in getattr(config.scheduler, "_schedulers", [config.scheduler]):
                set_learning_rate(scheduler.optimizer, lr, "initial_lr")
                scheduler.base_lrs = [lr] * len(scheduler.optimizer.param_groups)


def set_learning_rate(optimizer: Optimizer, lr: float | None, key: str = "lr") -> None:
    """Give every parameter group this rate, unless it is None."""
    for group in optimizer.param_groups if lr is not None else ():
        group[key] = lr


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


KEY = "lr_global_batch"  # in a checkpoint


def global_batch_size(trainer: pl.Trainer | None) -> int:
    """Return the images of one optimizer step: a batch × processes × accumulated batches.

    A data module that has `images_a_batch(processes)`, as those of nmlightning, says with it how
    many a batch holds in fact, which are fewer than `batch_size` if it has no more.
    """
    data: Any = getattr(trainer, "datamodule", None)
    size = getattr(data, "batch_size", None)
    if trainer is None or not isinstance(size, int):
        raise InputError(
            "lr_batch_size scales the learning rate with the batch, whose size is not known: fit "
            "with a data module that has a batch_size, or scale the rate yourself and set "
            "lr_batch_size to None."
        )
    ranks = trainer.distributed_sampler_kwargs
    processes = int(ranks["num_replicas"]) if ranks else 1
    if hasattr(data, "images_a_batch"):
        size = int(data.images_a_batch(processes))
    return size * processes * trainer.accumulate_grad_batches


def scale_learning_rates(optimizer: Optimizer, meant_for: int, global_batch: int) -> None:
    """Multiply the learning rate of every group by global_batch / meant_for, and say so.

    Goyal et al. (2017), section 2.1, https://arxiv.org/abs/1706.02677. It comes before the
    scheduler, which takes the rates that it finds for the first.
    """
    if global_batch == meant_for:
        return
    before = _learning_rates(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * global_batch / meant_for
    rank_zero_info(
        f"ImageClassifier: learning rate {before} × {global_batch}/{meant_for} = "
        f"{_learning_rates(optimizer)}, for {global_batch} images a step instead of {meant_for}"
    )


def _learning_rates(optimizer: Optimizer) -> str:
    rates = dict.fromkeys(f"{float(group['lr']):.6g}" for group in optimizer.param_groups)
    return ", ".join(rates)
