"""The recording of a Trainer's run: when its weights are measured, and the file of the records."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from nmlightning.callbacks.epoch_clock import AttemptedSteps
from nmlightning.callbacks.steering import describe_run
from nmlightning.compat import in_added_epoch, is_trial_run, logging_is_due, run_folder
from nmlightning.kernels.dispatch import weight_kernels
from nmlightning.name_patterns import some
from nmlightning.tracking.step_meter import DEFAULT, StepMeter
from nmlightning.weights import layer_weights
from nmlightning.weights.recorder import Recorder, keep_recording, rates_of


class RunRecording:
    """The records of one fit, and before them those of the run in `state` that it resumes."""

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        steps: AttemptedSteps,
        state: Mapping[str, Any],
        *,
        every: Literal["epoch"] | int,
        patterns: tuple[Sequence[str], Sequence[str]],
        quantities: Sequence[str] | None,
        taken: Collection[Path | None],
    ) -> None:
        self._trainer = trainer
        self._steps = steps
        self._every = every
        include, exclude = patterns
        weights = layer_weights.find_recorded_weights(module, include, exclude)
        lazy = layer_weights.find_lazy_weights(module, include, exclude)
        if lazy:
            have, are = ("have", "are") if len(lazy) > 1 else ("has", "is")
            fate = f"{have} no shape yet and {are} not recorded: {layer_weights.LAZY_WAY_OUT}."
            rank_zero_warn(f"{' and '.join(lazy)} {fate}")
        self.left = {} if include else layer_weights.find_left_weights(module, exclude)
        if self.left:
            left = [f"{name} ({reason})" for name, reason in self.left.items()]
            rank_zero_info(f"WeightNormTracker does not record {some(left, 3)}: use include.")
        folder = run_folder(trainer)
        checkpoint = trainer.ckpt_path and Path(trainer.ckpt_path)
        kept, earlier = keep_recording(folder, state, taken, checkpoint or None)
        self._kept = trainer.strategy.broadcast(kept)
        self.file: Path = self._kept.file
        config = Path(trainer.log_dir or folder)
        provenance = {**describe_run(trainer, config), "run": self._kept.run}
        wanted = DEFAULT if quantities is None else quantities
        recorded = [name for name in quantities or () if name != "weight_norm"]
        self.recorder = Recorder(weights, provenance, earlier, weight_kernels, recorded)
        self.meter = StepMeter(self.recorder, wanted)
        self._measured: dict[str, Tensor] = {}
        self.logs = False  # what the meter measures, at the steps that are logged
        self._rates: dict[int, tuple[float, float]] = {}
        self._writes = trainer.is_global_zero and not is_trial_run(trainer)
        for optimizer in trainer.optimizers:
            self.before_step(optimizer)
        if earlier is None:
            self._record()
        self.after_batch()  # what was due at a checkpoint that came before it

    def begin_batch(self) -> None:
        """Drop the steps of the batch before."""
        self._measured = {}
        self.meter.forget()

    def before_step(self, optimizer: Optimizer) -> None:
        """Note the rates of this step, which a scheduler may change before it is recorded."""
        self._rates |= rates_of(optimizer)
        if (self.logs and logging_is_due(self._trainer)) or (
            self.recorder.quantities and self._is_due(1)
        ):
            self.meter.measure(_remaining_scale(self._trainer, optimizer), optimizer)
            self.meter.begin(optimizer)

    def after_batch(self) -> None:
        """Record if a multiple of N was passed; several optimizers step more than once."""
        self._measured = self.meter.finish() if self.meter.has_steps else {}
        if self._every != "epoch" and self._is_due(0):
            self._record()

    def end_epoch(self) -> None:
        self._record()
        if self._trainer.is_last_batch:
            self.recorder.end_epoch()
        self._save()

    def close(self, *, finished: bool) -> None:
        if finished:
            self.recorder.finish()
            self._save()
            if self._writes:
                count = len(self.recorder.weights)
                rank_zero_info(
                    f"WeightNormTracker: the norms of {count} weights are in {self.file}"
                )

    def state_dict(self) -> dict[str, Any]:
        """Write, and return where."""
        self._save()
        kept = self._kept.state_dict(self.recorder.last_step)
        meter = {"meter": self.meter.state_dict()} if self.recorder.quantities else {}
        return {**kept, "uncounted_steps": self._steps.uncounted, **meter}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume what is measured; the records were resumed at the start."""
        if "meter" in state:
            self.meter.load_state_dict(state["meter"])

    def _is_due(self, later: int) -> bool:
        """Return whether there will be a record in so many steps."""
        if self._every == "epoch":
            return self._trainer.is_last_batch
        return (self._steps.count + later) // self._every > self.recorder.last_step // self._every

    def _record(self) -> None:
        if not in_added_epoch(self._trainer):
            epoch = self._trainer.current_epoch
            self.recorder.record(self._steps.count, epoch, self._rates, self._measured)

    def _save(self) -> None:
        if self._writes:
            self.recorder.save(self._kept.file)
        else:
            self.recorder.forget()


def _remaining_scale(trainer: pl.Trainer, optimizer: Optimizer) -> float:
    """Return what gradients are still multiplied by: a fused optimizer divides by it itself."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    is_fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    return float(scaler.get_scale()) if scaler is not None and is_fused else 1.0
