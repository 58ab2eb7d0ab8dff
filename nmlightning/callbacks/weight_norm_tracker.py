"""WeightNormTracker: record the norms of the weights, and let a recording steer a run."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch.optim import Optimizer

from nmlightning.callbacks.norm_dashboard import NormDashboard
from nmlightning.callbacks.provenance import describe_run
from nmlightning.callbacks.steering import SteeredRun, check_steering, resume_steering
from nmlightning.compat import CallbackBase, in_added_epoch, is_trial_run
from nmlightning.errors import InputError, check_lists
from nmlightning.optim import Steering
from nmlightning.optim.step_hooks import Attachment
from nmlightning.weights.history import NormHistory
from nmlightning.weights.layer_weights import LAZY_WAY_OUT, find_lazy_weights, find_recorded_weights
from nmlightning.weights.recorder import Recorder
from nmlightning.weights.recording_file import FILE_NAME

if TYPE_CHECKING:
    import pytorch_lightning as pl


@dataclass(frozen=True)
class KeptRecording:
    """Where a run keeps its records.

    Attributes:
        file: nothing but this run is in it.
        run: a name that a run and those that go on with it share, and no other.
    """

    file: Path
    run: str

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return what the run needs that goes on from the record at `step`."""
        return {"file": str(self.file.absolute()), "run": self.run, "step": step}


def keep_recording(
    folder: Path, state: Mapping[str, Any]
) -> tuple[KeptRecording, NormHistory | None]:
    """Return where a run in `folder` keeps its records, and those it goes on with.

    A run goes on in its own file if that is in this folder; what it recorded there after the
    checkpoint is then replaced. Every other run gets a name that nothing has yet.

    Args:
        folder: of the run.
        state: of the run that it goes on with, by `state_dict`; empty for a new one.
    """
    file = _file_of(folder, state) if state else None
    if file is None:
        return KeptRecording(_free_file(folder), uuid4().hex), None
    earlier = NormHistory.load(file, finite=False).until(int(state["step"]))
    at_home = file.parent.resolve() == folder.resolve()
    return KeptRecording(file if at_home else _free_file(folder), state["run"]), earlier


def _file_of(folder: Path, state: Mapping[str, Any]) -> Path | None:
    """Return the file of a run, also from a folder that was moved."""
    noted = Path(state["file"])
    for file in (noted, folder / noted.name):
        if (
            file.is_file()
            and NormHistory.load(file, finite=False).provenance.get("run") == state["run"]
        ):
            return file
    warnings.warn(
        f"The recording that the checkpoint goes on with is gone: {noted}. The new one "
        f"starts at step {state['step']}.",
        stacklevel=2,
    )
    return None


def _free_file(folder: Path) -> Path:
    """Return a file name in `folder` that nothing has yet."""
    stem, suffix = FILE_NAME.split(".")
    names = (FILE_NAME, *(f"{stem}-v{version}.{suffix}" for version in range(1, 10_000)))
    return next(folder / name for name in names if not (folder / name).exists())


class WeightNormTracker(CallbackBase):
    """Records the norm of every output channel of all convolutions and linear layers.

    Also, twice, that of each weight that is normalised: of w, and as `…_v` of the hidden v.

    The recording is `weight_norms.safetensors` in the run's folder, with or without a logger. It is
    written at the end of every epoch and with every checkpoint, at once or not at all; a resumed
    run goes on with the records of the one before it, and in its file where the folder is the same.
    Read it with `nmlightning.NormHistory`.

    Args:
        every: record at the start and the end of each "epoch", or at every N-th optimizer step too.
        steering: what moves the weights by a recording, or by a rule: `LRCorrection`,
            `NormSchedule`, `DecayEquivalentLR`, `Hyperball` or `RadialProjection`; None only
            records. A reference may be the folder of an experiment, `runs/wd_on`; it then is its
            latest run with the seed of this one, one that finished if there is any.
        include: glob patterns on weight names to record, such as `net.layer1.*`, also those of an
            embedding or an LSTM; empty means those above.
        exclude: glob patterns on names that are not recorded.
        other_run: steer also by the recording of a run with another seed or another number of
            processes, whose moments then are epochs of other batches.
        log_norms: show the norms, effective learning rates, rotations and factors in the Trainer's
            loggers at the steps it logs at, and in TensorBoard as histograms and pictures too;
            None does so if there is a logger, True insists on one.

    Raises:
        InputError: on construction for another `every`; at the start of a fit for a pattern that
            matches nothing, for `log_norms` without a logger, and for a reference that does not fit
            the model or is shorter than the run.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[WeightNormTracker()], logger=False)
    """

    def __init__(
        self,
        every: Literal["epoch"] | int = "epoch",
        steering: Steering | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        other_run: bool = False,
        log_norms: bool | None = None,
    ) -> None:
        super().__init__()
        steps = isinstance(every, int) and not isinstance(every, bool) and every >= 1
        if every != "epoch" and not steps:
            raise InputError(f"every is 'epoch' or a number of steps from 1 on, got {every!r}.")
        check_lists(include=include, exclude=exclude)
        check_steering(steering)
        self.every = every
        self.steering = steering
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self.other_run = other_run
        self.log_norms = log_norms
        self._kept: KeptRecording | None = None
        self._recorder: Recorder | None = None
        self._steered: SteeredRun | None = None
        self._dashboard: NormDashboard | None = None
        self._rates: dict[int, tuple[float, float]] = {}
        self._resumed: Mapping[str, Any] = {}
        self._writes = False

    @property
    def path(self) -> Path | None:
        """The file of the records, once the fit has started."""
        return None if self._kept is None else self._kept.file

    @property
    def attachments(self) -> list[Attachment]:
        """The rule at work on each optimizer that it steers."""
        return [] if self._steered is None else self._steered.attachments

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Take the first record, and steer from the first step on."""
        weights = find_recorded_weights(pl_module, self.include, self.exclude)
        _warn_of_lazy(find_lazy_weights(pl_module, self.include, self.exclude))
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        kept, earlier = keep_recording(folder, self._resumed.get("recording", {}))
        self._kept = trainer.strategy.broadcast(kept)
        provenance = {**describe_run(trainer, folder), "run": self._kept.run}
        self._recorder = Recorder(weights, provenance, earlier)
        self._rates = {}
        self._writes = trainer.is_global_zero and not is_trial_run(trainer)
        for optimizer in trainer.optimizers:
            self._note_rates(optimizer)
        self._record(trainer)
        self._steered = self._steer(trainer, pl_module)
        self._dashboard = NormDashboard(trainer, weights) if self._logs(trainer) else None
        self._go_on(trainer.global_step)

    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Note how far the epoch is."""
        if self._steered is not None:
            self._steered.begin_batch(batch_idx)

    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        """Note the rates of this step, which a scheduler may change before it is recorded."""
        self._note_rates(optimizer)
        if self._steered is not None:
            self._steered.before_step(optimizer)
        if self._dashboard is not None:
            self._dashboard.before_step(optimizer)

    def on_train_batch_end(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Record at every N-th step, and say once what is steered."""
        if self._steered is not None:
            self._steered.tell_scope()
        if self._is_due(trainer):
            self._record(trainer)
        if self._dashboard is not None:
            self._dashboard.after_batch(self.attachments)

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Record, write and show."""
        if self._steered is not None:
            self._steered.tell_scope(at_last=True)  # a weight without gradients is never measured
            self._steered.look()
        self._record(trainer)
        if self._recorder is not None and trainer.is_last_batch:
            self._recorder.end_epoch()
        self._save()
        if self._dashboard is not None and self._recorder is not None:
            self._dashboard.end_epoch(self._recorder.history())

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Write, and let the optimizers step freely again."""
        if self._recorder is not None:
            self._recorder.finish()
        self._save()
        self._detach()

    def on_exception(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException
    ) -> None:
        """Let the optimizers step freely again."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """Return where the records are and what steers, for the run that goes on from here."""
        if self._recorder is None or self._kept is None:
            return dict(self._resumed)
        self._save()
        return {
            "recording": self._kept.state_dict(self._recorder.last_step),
            "steering": None if self._steered is None else self._steered.state_dict(),
            "dashboard": None if self._dashboard is None else self._dashboard.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the records and the steering of a checkpoint."""
        self._resumed = state_dict

    def _steer(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> SteeredRun | None:
        if self.steering is None:
            return None
        return SteeredRun(self.steering, trainer, pl_module, other_run=self.other_run)

    def _go_on(self, step: int) -> None:
        resume_steering(self._steered, self._resumed.get("steering"), step)
        shown = self._resumed.get("dashboard")
        if self._dashboard is not None and shown is not None:
            self._dashboard.load_state_dict(shown)
        self._resumed = {}

    def _note_rates(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            rates = float(group["lr"]), float(group.get("weight_decay", 0.0))
            self._rates.update((id(parameter), rates) for parameter in group["params"])

    def _is_due(self, trainer: "pl.Trainer") -> bool:
        """Return whether a multiple of `every` was passed; several optimizers step more at once."""
        if self.every == "epoch" or self._recorder is None:
            return False
        every = int(self.every)
        return trainer.global_step // every > self._recorder.last_step // every

    def _record(self, trainer: "pl.Trainer") -> None:
        assert self._recorder is not None, "the fit has started"
        if not in_added_epoch(trainer):
            self._recorder.record(trainer.global_step, trainer.current_epoch, self._rates)

    def _save(self) -> None:
        if self._writes and self._recorder is not None and self._kept is not None:
            self._recorder.save(self._kept.file)

    def _logs(self, trainer: "pl.Trainer") -> bool:
        if self.log_norms and not trainer.loggers:
            raise InputError(
                "WeightNormTracker(log_norms=True) finds no logger to log to: give the Trainer "
                "one, for instance logger=True, or leave log_norms out."
            )
        return bool(trainer.loggers) if self.log_norms is None else self.log_norms

    def _detach(self) -> None:
        if self._dashboard is not None:
            self._dashboard.remove()
        if self._steered is not None:
            self._steered.remove()


@rank_zero_only
def _warn_of_lazy(names: Sequence[str]) -> None:
    if names:
        each = f"{' and '.join(names)} {'have' if len(names) > 1 else 'has'} no shape yet and"
        fate = f"{'are' if len(names) > 1 else 'is'} not recorded: {LAZY_WAY_OUT}."
        warnings.warn(f"{each} {fate}", stacklevel=2)
