"""Steering: a rule on the optimizers of a Trainer, by a recording whose run is like this one."""

import copy
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import nn
from torch.optim import Optimizer

from nmlightning.callbacks.epoch_clock import AttemptedSteps, EpochClock, steps_per_epoch
from nmlightning.compat import epochs_to_train, global_seed
from nmlightning.errors import InputError
from nmlightning.name_patterns import some
from nmlightning.optim.families import group_numbers
from nmlightning.optim.norm_schedule import NormSchedule
from nmlightning.optim.scope import NamedWeights, has_weights, scope_text, unsteered_reason
from nmlightning.optim.step_hooks import StepHookHandle, StepRule
from nmlightning.parametrizations import WeightNorm
from nmlightning.reports.formatting import Grid, show
from nmlightning.weights.history import NormHistory
from nmlightning.weights.recording_file import find_recording


class SteeredRun:
    """Attaches a rule where a Trainer's optimizers have weights for it, and gives it the moment.

    With `other_run` it also follows the recording of another seed or number of processes. A rule
    that includes nothing works `within` the patterns to include and to exclude. `steps` tell whose
    steps they are, and `lists_weights` prints also those that are steered.
    """

    def __init__(
        self,
        rule: StepRule,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        steps: AttemptedSteps,
        *,
        other_run: bool,
        within: tuple[Sequence[str], Sequence[str]],
        lists_weights: bool,
    ) -> None:
        self._trainer, self._module, self._steps = trainer, module, steps
        self._has_printed = self._has_warned = False
        self._lists_weights = lists_weights
        norms = [part for part in module.modules() if isinstance(part, WeightNorm)]
        if isinstance(rule, NormSchedule) and any(norm.settings.project for norm in norms):
            raise InputError(
                "NormSchedule sets the norms that project=True sets, too: normalise the weights "
                "without it."
            )
        followed = rule.reference
        if isinstance(followed, str | Path):
            followed = NormHistory.load(find_recording(Path(followed), global_seed()))
        rule = copy.copy(rule)
        rule.within = ((), ()) if rule.include else within
        if followed is not None:
            rule.reference = followed
            check_same_run(followed, trainer, other_run=other_run)
        self._rule = rule
        self._clock = EpochClock(trainer, followed)
        optimizers = trainer.optimizers
        optimizers = [o for o in optimizers if has_weights(o, module, rule.choice)] or optimizers
        self.handles = [self._attach(optimizer) for optimizer in optimizers]
        if followed is not None and not other_run:
            names = [weight.name for handle in self.handles for weight in handle.weights]
            check_same_optimizer(followed, names, optimizers)

    def begin_batch(self, batch: int) -> None:
        self._clock.begin_batch(batch)

    def before_step(self, optimizer: Optimizer) -> None:
        """Note a step, and measure the gradients before they are clipped."""
        self._clock.attempt(optimizer)
        for handle in self.handles:
            handle.measure()

    def after_batch(self) -> None:
        """Print the scope once all weights are measured."""
        if all(handle.measured for handle in self.handles):
            self._log_scope()

    def end_epoch(self) -> None:
        """Warn of skipped steps; print the scope, for a weight without gradients has no measure."""
        self._log_scope()
        for handle in self.handles:
            handle.warn_if_skipped()
            learns = any(w.parameter.grad is not None for w in handle.weights)
            if learns and not handle.steps and not self._has_warned:
                self._has_warned = True
                reason = "only step() calls it, no other method"
                if other := self._steps.stranger:
                    reason = f"{other} steps instead; return it from configure_optimizers"
                warnings.warn(
                    f"There are gradients, and no step of the optimizer has called {handle.name} "
                    f"yet: {reason}.",
                    stacklevel=2,
                )

    def close(self, *, finished: bool) -> None:
        for handle in self.handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        return {
            "clock": self._clock.state_dict(),
            "attachments": [handle.state_dict() for handle in self.handles],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        kept = state["attachments"]
        if len(self.handles) != len(kept):
            raise InputError(
                f"The checkpoint was steered in {len(kept)} optimizers, and this run is in "
                f"{len(self.handles)}: resume with the same, or start from the weights alone."
            )
        self._clock.load_state_dict(state["clock"])
        for handle, each in zip(self.handles, kept, strict=True):
            handle.load_state_dict(each)

    def _attach(self, optimizer: Optimizer) -> StepHookHandle:
        handle = self._rule.attach(optimizer, self._module)
        handle.clock = lambda: {"epoch": self._clock.moment(optimizer)}
        return handle

    def _log_scope(self) -> None:
        if not self._has_printed:
            self._has_printed = True
            model, optimizers = self._module, self._trainer.optimizers
            print_scope(self._rule, self.handles, model, optimizers, self._lists_weights)


@rank_zero_only
def print_scope(
    rule: StepRule,
    handles: Sequence[StepHookHandle],
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    whole: bool,
) -> None:
    """Print to stderr how many layers are steered, and which are not and why; or all."""
    optimized = {q for optimizer in optimizers for q in group_numbers(optimizer)}
    weights = NamedWeights.of(model)
    reasons = {
        name: f"not steered: {unsteered_reason(weights, name, optimized, rule.choice)}"
        for name in weights.parameters
        if name in (weights.layers or ())
    }
    for handle in handles:
        reasons |= handle.reasons()
    text = scope_text(type(rule).__name__, reasons, sys.stderr)
    if whole:
        show(Grid(("weight", "steering"), list(reasons.items()), text.partition(";")[0]), err=True)
    else:
        print(text, file=sys.stderr)


def warn_of_other_steering(
    handles: Sequence[StepHookHandle], state: Mapping[str, Any] | None, step: int
) -> None:
    """Warn where either this run or its checkpoint, of `step` optimizer steps, is not steered."""
    if state is not None and not handles:
        rule = state["attachments"][0]["rule"]
        warnings.warn(
            f"The checkpoint was steered by {rule}, and this run is not steered.", stacklevel=2
        )
    elif state is None and handles and step > 0:
        warnings.warn(
            f"The checkpoint was not steered; {handles[0].name} steers this run from step {step} "
            "on.",
            stacklevel=2,
        )


_ROUNDING = 1e-9  # of a number of epochs that is no whole one


def describe_run(trainer: pl.Trainer, folder: Path) -> dict[str, Any]:
    """Return seed, world size, steps per epoch, optimizers, versions and, if it has one, config."""
    config = folder / "config.yaml"
    optimizers = []
    for optimizer in trainer.optimizers:
        options = optimizer.defaults.items()
        plain = {k: v for k, v in options if isinstance(v, int | float | str | None)}
        optimizers.append({"name": type(optimizer).__name__, **plain})
    return {
        "seed": global_seed(),
        "world_size": trainer.world_size,
        "steps_per_epoch": steps_per_epoch(trainer),
        "optimizers": optimizers,
        "versions": {name: version(name) for name in ("torch", "pytorch-lightning")},
        "config": config.read_text(encoding="utf-8") if config.is_file() else None,
    }


def check_same_run(history: NormHistory, trainer: pl.Trainer, *, other_run: bool) -> None:
    """Raise InputError if the run is longer than the recording, or has another seed or size."""
    recorded, most = history.clock.covered, epochs_to_train(trainer)
    epochs = math.inf if most is None else float(most)
    if trainer.max_steps >= 0 and len(history):
        # Epochs of unknown length are taken to be as long as the recording's.
        length = max(history.clock.length_of(int(history.epochs[-1])), 1)
        epochs = min(epochs, trainer.max_steps / (steps_per_epoch(trainer) or length))
    if recorded + _ROUNDING < epochs < math.inf:
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
                f"The recording is from a run with {key} {there}, and this one has {value}; set "
                "other_run=True to follow it."
            )


def check_same_optimizer(
    history: NormHistory, names: Sequence[str], optimizers: Sequence[Optimizer]
) -> None:
    """Compare optimizers, learning rates and decays with those of a recording, where it has them.

    Another class raises InputError; another rate, and a recording that does not decay the weights
    of these `names`, are warned of.
    """
    recorded = history.provenance.get("optimizers") or []
    names_there = [each.get("name") for each in recorded]
    for optimizer in optimizers:
        name, rate = type(optimizer).__name__, float(optimizer.defaults["lr"])
        if names_there and name not in names_there:
            raise InputError(
                f"The recording is from a run with {' and '.join(map(str, names_there))}, and this "
                f"one has {name}, whose steps depend on norms in another way; set "
                "other_run=True to follow it."
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
        f"The recording is from a run {difference}; if intended set other_run=True.", stacklevel=2
    )
