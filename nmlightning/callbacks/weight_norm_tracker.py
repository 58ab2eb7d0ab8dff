"""WeightNormTracker: record the norms of the weights, and let a recording steer a run."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from torch.optim import Optimizer

from nmlightning.callbacks.epoch_clock import AttemptedSteps
from nmlightning.callbacks.norm_dashboard import NormDashboard
from nmlightning.callbacks.run_recording import RunRecording
from nmlightning.callbacks.steering import SteeredRun, warn_of_other_steering
from nmlightning.compat import CallbackBase, copying_strategy, is_trial_run, logging_is_due, reshard
from nmlightning.errors import InputError, check_choice, check_flag, check_lists
from nmlightning.optim.step_hooks import StepHookHandle, StepRule
from nmlightning.probe.directions import DirectionWatch
from nmlightning.surgery.recipes import register_after
from nmlightning.tracking.step_meter import check_quantities


def _stable_text(setting: object) -> str:
    """Return it as text, without the address of a function."""
    named = setting if hasattr(setting, "__qualname__") else type(setting)
    return named.__qualname__ if callable(setting) else str(setting)


class WeightNormTracker(CallbackBase):
    """Records the norm of every output channel of all convolutions and linear layers.

    A weight that is computed, by weight norm, spectral norm, pruning or any parametrization, is
    recorded twice: as it is in evaluation, and as `…_v` the parameter behind it.

    The recording is `weight_norms.safetensors` in the folder of the first logger, or without one in
    the Trainer's `default_root_dir`; where that is not given either, in `lightning_logs/version_N`,
    not in the current folder itself. A line at the end of the fit says where. It is written at the
    end of every epoch and with every checkpoint. A resumed run continues the records of the run
    before it. Read it with `nmlightning.NormHistory`.

    Args:
        every: record at the start and the end of each "epoch", or at every N-th optimizer step too.
        steering: a rule that changes the optimizer's steps, such as `LRCorrection` or `Hyperball`;
            None only records. A reference may be the folder of an experiment, `runs/wd_on`: then it
            is the latest run with this run's seed, a finished one if there is any.
        include: glob patterns on weight names to record, such as `net.layer1.*`, also those of an
            embedding or an LSTM; empty means those above. A rule without an include of its own
            steers none of the others.
        exclude: glob patterns on names that are not recorded and not steered.
        other_run: steer also by the recording of a run with another seed or another number of
            processes, whose moments then are epochs of other batches.
        log_norms: show the norms, effective learning rates, rotations and factors at the steps the
            Trainer logs at: in TensorBoard of each layer, also as histograms and pictures, in other
            loggers over all layers. None does so if there is a logger, True insists on one, and
            "layers" logs each layer everywhere. The tags of a Trainer's second tracker begin with
            `tracker2/`.
        log_int8: log with the norms, for layers in int8, by how many degrees rounding turns their
            input, weight and gradient, as `nmlightning.probe_int8` does at their own bits. Compiled
            layers are not looked into.
        list_weights: print what is decided of each weight, not only which are not steered.

    Raises:
        InputError: on construction for another `every`; at the start of a fit for a pattern that
            matches nothing, for `log_norms` without a logger, and for a reference that does not fit
            the model or is shorter than the run.

    Attributes:
        path: the file of the records, once the fit has started; None of `fast_dev_run`.
        handles: the rule at work on each optimizer that it steers.
        left: matrices of unknown classes, which are not recorded, with the reason.

    Examples:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[WeightNormTracker()], logger=False)
    """

    def __init__(
        self,
        every: Literal["epoch"] | int = "epoch",
        steering: StepRule | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        other_run: bool = False,
        log_norms: bool | Literal["layers"] | None = None,
        list_weights: bool = False,
        log_int8: bool = False,
        quantities: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        steps = isinstance(every, int) and not isinstance(every, bool) and every >= 1
        if every != "epoch" and not steps:
            raise InputError(f"every is 'epoch' or a number of steps from 1 on, got {every!r}.")
        check_lists(include=include, exclude=exclude)
        if not isinstance(steering, StepRule | None):
            raise InputError(
                f"steering is a rule, such as LRCorrection(…), or None, got {steering!r}."
            )
        check_choice("log_norms", log_norms, (None, True, False, "layers"))
        self.every = every
        self.steering = steering
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self.other_run = other_run
        self.log_norms = log_norms
        self.list_weights = check_flag("list_weights", list_weights)
        self.log_int8 = check_flag("log_int8", log_int8)
        self.quantities = None if quantities is None else check_quantities(quantities)
        self.path: Path | None = None
        self.handles: list[StepHookHandle] = []
        self.left: dict[str, str] = {}
        self._steps: AttemptedSteps | None = None
        self._parts: dict[str, SteeredRun | RunRecording | NormDashboard] = {}
        self._resumed: Mapping[str, Any] = {}

    @property
    def attachments(self) -> list[StepHookHandle]:
        """The former name of `handles`."""
        return self.handles

    @property
    def state_key(self) -> str:
        """Its name in a checkpoint, one for each choice of weights, moments and rule."""
        usual = {"every": "epoch", "include": (), "exclude": ()}
        chosen: dict[str, Any] = {name: getattr(self, name) for name in usual}
        if self.log_norms is not None:
            chosen["log_norms"] = self.log_norms
        if self.quantities is not None:
            chosen["quantities"] = self.quantities
        if (rule := self.steering) is not None:
            chosen[type(rule).__name__] = {k: _stable_text(v) for k, v in vars(rule).items()}
        return super().state_key if chosen == usual else self._generate_state_key(**chosen)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the state of a checkpoint that is of other settings, or of an older release."""
        self.check_launch(trainer, pl_module)
        keys = [tracker.state_key for tracker in _trackers(trainer)]
        register_after(
            pl_module, "on_load_checkpoint", partial(_rename_states, keys), key="trackers"
        )

    def check_launch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise InputError, if possible before there are processes, where they train copies."""
        strategy = copying_strategy(trainer)
        if trainer.state.fn == "fit" and strategy:
            raise InputError(
                f"The strategy {strategy} trains copies of the callbacks, and your "
                'WeightNormTracker would get neither path nor state: use strategy="ddp".'
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the first record, and steer from the first step on."""
        reshard(pl_module)
        state = self._resumed.get("recording", {})
        uncounted = state.get("uncounted_steps", 0)
        self._steps = AttemptedSteps(trainer, pl_module, self._before_step, uncounted)
        logs = self._logs(trainer)
        recording = RunRecording(
            trainer,
            pl_module,
            self._steps,
            state,
            every=self.every,
            patterns=(self.include, self.exclude),
            quantities=self.quantities,
            taken=[other.path for other in _trackers(trainer) if other is not self],
        )
        self.left = recording.left
        self.path = None if is_trial_run(trainer) else recording.file
        self.handles, steering = [], {}
        if self.steering is not None:
            steered = SteeredRun(
                self.steering,
                trainer,
                pl_module,
                self._steps,
                other_run=self.other_run,
                within=(self.include, self.exclude),
                lists_weights=self.list_weights,
            )
            self.handles, steering = steered.handles, {"steering": steered}
        self._parts = {**steering, "recording": recording}  # where a step changed the weights first
        recording.meter.handles, recording.logs = self.handles, logs
        self._steps.at_step = recording.meter.measure_step
        if logs:
            trackers = _trackers(trainer)
            number = trackers.index(self) + 1
            parts = [tracker._parts.get("dashboard") for tracker in trackers[: number - 1]]
            layouts = [part.layouts for part in parts if isinstance(part, NormDashboard)]
            dashboard = NormDashboard(
                trainer,
                recording.meter,
                by_layer=self.log_norms == "layers",
                prefix="" if number == 1 else f"tracker{number}/",
                layouts=layouts[-1] if layouts else {},
                angles=_watch_int8(trainer, pl_module) if self.log_int8 else None,
            )
            self._parts["dashboard"] = dashboard
        states = {name: state for name, state in self._resumed.items() if state is not None}
        warn_of_other_steering(self.handles, states.get("steering"), self._steps.count)
        for name in states.keys() & self._parts.keys():
            self._parts[name].load_state_dict(states[name])
        self._resumed = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._steps is not None:
            self._steps.begin_batch()
        if isinstance(steering := self._parts.get("steering"), SteeredRun):
            steering.begin_batch(batch_idx)
        if isinstance(recording := self._parts.get("recording"), RunRecording):
            recording.begin_batch()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Note the rates, the gradients and the weights of this step."""
        if self._steps is not None:
            self._steps.announce(optimizer)
        self._before_step(optimizer)

    def on_train_batch_end(self, *_: Any) -> None:
        """Record at every N-th step, log, and print once what is steered."""
        for part in self._parts.values():
            part.after_batch()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for part in self._parts.values():
            part.end_epoch()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close(finished=True)

    def on_exception(self, *_: Any) -> None:
        self._close(finished=False)

    def state_dict(self) -> dict[str, Any]:
        """Return where the records are and what steers, for a run that resumes this one."""
        if not self._parts:
            return dict(self._resumed)
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict

    def _logs(self, trainer: pl.Trainer) -> bool:
        if self.log_norms and not trainer.loggers:
            raise InputError(
                f"WeightNormTracker(log_norms={self.log_norms!r}) has no logger to log to: give "
                "the Trainer one, for instance logger=True, or leave log_norms out."
            )
        return bool(trainer.loggers if self.log_norms is None else self.log_norms)

    def _before_step(self, optimizer: Optimizer) -> None:
        for part in self._parts.values():
            part.before_step(optimizer)

    def _close(self, *, finished: bool) -> None:
        if self._steps is not None:
            self._steps.remove()
        for part in reversed(self._parts.values()):
            part.close(finished=finished)


def _watch_int8(trainer: pl.Trainer, module: pl.LightningModule) -> DirectionWatch:
    """Return what measures the layers in int8 in the training batches that are logged."""
    watch = DirectionWatch(module, None, lambda: trainer.training and logging_is_due(trainer))
    if not watch.layers:
        raise InputError(
            f"WeightNormTracker(log_int8=True) found no layer in int8 in {type(module).__name__}: "
            "add Int8Swap to the callbacks, or leave log_int8 out."
        )
    return watch


def _trackers(trainer: pl.Trainer) -> list[WeightNormTracker]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # A connector sets them.
    return [callback for callback in callbacks if isinstance(callback, WeightNormTracker)]


def _rename_states(keys: Sequence[str], checkpoint: dict[str, Any]) -> None:
    """Give the trackers' states of a checkpoint the names of the trackers that are here."""
    states = checkpoint.get("callbacks") or {}
    names = {key.partition("{")[0] for key in keys}
    here = [key for key in keys if key not in states]
    there = [k for k in states if k not in keys and str(k).partition("{")[0] in names]
    if len(here) == len(there):
        for new, old in zip(here, there, strict=True):
            states[new] = states.pop(old)
