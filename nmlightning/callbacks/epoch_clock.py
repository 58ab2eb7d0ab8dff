"""Counts the attempted and the skipped steps of a run, and gives its position in its epochs."""

import math
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from nmlightning.compat import in_added_epoch
from nmlightning.errors import InputError
from nmlightning.optim.families import group_numbers
from nmlightning.optim.step_hooks import call_before_step
from nmlightning.weights.history import NormHistory

_SHORTLY = 1e-9  # before an epoch's end, in epochs
_KEPT = ("epoch", "attempts", "last_epoch", "next_batch")  # of a clock, in checkpoints


def steps_per_epoch(trainer: pl.Trainer) -> int | None:
    """Return the attempted steps of an epoch; None where the Trainer does not know them."""
    batches = trainer.num_training_batches
    if not trainer.lightning_module.automatic_optimization or not math.isfinite(batches):
        return None
    return math.ceil(batches / trainer.accumulate_grad_batches)


class AttemptedSteps:
    """Counts the attempted steps of whatever optimizes a module's parameters.

    Lightning counts, and announces, those that are taken through its own LightningOptimizer. To
    them come the `uncounted`: steps of an optimizer itself (`use_pl_optimizer=False`), of the one
    inside a wrapper, such as SAM's, and of one that the Trainer has not been given. What steps
    within another step is a part of that. Before a step that is not announced moves anything,
    `before_step` is called with the Trainer's optimizer of these parameters, if there is one.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        before_step: Callable[[Optimizer], None],
        uncounted: int = 0,
    ) -> None:
        self.uncounted = uncounted
        # Called just before a step moves anything.
        self.at_step: Callable[[Optimizer], Any] = lambda _: None
        self.stranger = ""  # the class of an optimizer that the Trainer has not been given
        self._trainer, self._before_step = trainer, before_step
        self._parameters = {id(parameter) for parameter in module.parameters()}
        self._announced: set[Optimizer] = set()
        self._depth = 0
        self._is_noted = False
        self._hooks = [
            register_optimizer_step_pre_hook(self._begin),
            register_optimizer_step_post_hook(self._end),
        ]

    @property
    def count(self) -> int:
        """The number of attempted steps, over all optimizers."""
        return self._trainer.global_step + self.uncounted

    def begin_batch(self) -> None:
        """Forget a step that did not end, or was announced and skipped."""
        self._depth = 0
        self._announced.clear()

    def announce(self, optimizer: Optimizer) -> None:
        """Note a step that Lightning counts: it is about to be taken, or begun with a closure."""
        self._announced.add(optimizer)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if not self._is_ours(optimizer):
            return None
        self._depth += 1
        if self._depth > 1:
            return None
        self._is_noted = False
        return call_before_step(partial(self._note, optimizer), args, kwargs)

    def _end(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._is_ours(optimizer):
            self._depth = max(self._depth - 1, 0)

    def _note(self, optimizer: Optimizer) -> None:
        known, stepping = self._trainer.optimizers, optimizer
        if optimizer not in known:
            self.stranger = type(optimizer).__name__
            owned = {id(q) for group in optimizer.param_groups for q in group["params"]}
            sharing = [o for o in known if any(id(q) in owned for q in group_numbers(o))]
            optimizer = next(iter(sharing), optimizer)
        if optimizer in self._announced:
            self._announced.discard(optimizer)
        elif not self._is_noted:  # a closure may be called several times in a step
            self.uncounted += 1
            self._before_step(optimizer)
        self._is_noted = True
        self.at_step(stepping)

    def _is_ours(self, optimizer: Optimizer) -> bool:
        groups = optimizer.param_groups
        return any(id(q) in self._parameters for group in groups for q in group["params"])


class EpochClock:
    """Gives the moment of each optimizer's step: the epoch and the part of it that is over.

        moment = epoch + attempted steps in it / steps in an epoch

    So a run with as many steps per epoch as another one has the same moments, and one with other
    batch sizes is mapped by its share of the epoch. Where the Trainer does not know the steps of an
    epoch, those of the epoch before count; in the first epoch, for a module that steps by
    hand, the share of its batches, and for data without a length the steps of `followed`, the
    recording.
    """

    def __init__(self, trainer: pl.Trainer, followed: NormHistory | None = None) -> None:
        self._trainer, self._followed = trainer, followed
        self._epoch, self._batch = -1, 0
        self._attempts = [0] * len(trainer.optimizers)
        self._last_epoch = list(self._attempts)
        self._next_batch = list(self._attempts)  # the first one that counts for the next step
        self._begins = list(self._attempts)

    def begin_batch(self, batch: int) -> None:
        self._batch = batch
        if self._trainer.current_epoch != self._epoch:
            self._epoch = self._trainer.current_epoch
            self._last_epoch = self._attempts
            self._attempts = [0] * len(self._attempts)
            self._next_batch = list(self._attempts)

    def attempt(self, optimizer: Optimizer) -> None:
        if optimizer not in self._trainer.optimizers:  # whose steps no rule is attached to
            return
        number = self._trainer.optimizers.index(optimizer)
        self._attempts[number] += 1
        self._begins[number] = min(self._next_batch[number], self._batch)
        self._next_batch[number] = self._batch + 1

    def moment(self, optimizer: Optimizer) -> float:
        """Return the moment before the step that was counted last."""
        epoch = self._trainer.current_epoch
        if in_added_epoch(self._trainer):
            return epoch - _SHORTLY
        over, total = self._progress(self._trainer.optimizers.index(optimizer))
        return epoch + min(over / total, 1 - _SHORTLY)

    def state_dict(self) -> dict[str, Any]:
        """Return the steps that a resumed run does not see."""
        return {name: copy(getattr(self, f"_{name}")) for name in _KEPT}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _KEPT:
            setattr(self, f"_{name}", copy(state[name]))

    def _progress(self, number: int) -> tuple[int, int]:
        """Return how many steps of the epoch are over, of how many."""
        batches, known = self._trainer.num_training_batches, steps_per_epoch(self._trainer)
        if known is not None:
            return self._batch // self._trainer.accumulate_grad_batches, known
        if self._last_epoch[number]:
            return self._attempts[number] - 1, self._last_epoch[number]
        if math.isfinite(batches):
            return self._begins[number], int(batches)
        attempts, epoch = sum(self._attempts), self._trainer.current_epoch
        steps = attempts if self._followed is None else self._followed.clock.length_of(epoch)
        if attempts > steps:
            raise InputError(
                f"The recording has {steps} steps in epoch {epoch + 1}, and this run, whose data "
                "has no length, continues: record a longer run, or set limit_train_batches."
            )
        return attempts - 1, steps


class SkippedSteps:
    """Counts, without waiting for the device, the steps that 16-bit mixed precision skipped.

    A GradScaler does not call an optimizer whose gradients overflowed; one that is fused it calls
    all the same, with the finding on the device. `watches` says whether there is a GradScaler.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self.watches = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._missed = 0  # attempts that the optimizer never saw
        self._found_on_device = torch.tensor(0.0)
        optimizers = trainer.optimizers if self.watches else []
        self._hooks = [o.register_step_post_hook(self._note) for o in optimizers]

    def attempt(self) -> None:
        self._missed += 1

    def count(self) -> Tensor:
        """Return how many of the attempted steps were skipped, on the device."""
        return self._found_on_device + float(self._missed)

    def resume_from(self, count: int) -> None:
        """Begin with the steps that were skipped before a resume."""
        self._missed += count

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, optimizer: Optimizer, *_: Any) -> None:
        self._missed -= 1
        found = getattr(optimizer, "found_inf", None)
        if found is not None:
            skipped = found.detach().reshape(())
            self._found_on_device = self._found_on_device.to(skipped.device) + skipped
