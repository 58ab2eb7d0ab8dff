"""WeightNormTracker: record the norms of the weights, and let a recording steer a run."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch.optim import Optimizer

from nmlightning.callbacks.attach_steering import (
    attach_steering,
    check_steering,
    resume_steering,
)
from nmlightning.callbacks.norm_dashboard import NormDashboard
from nmlightning.callbacks.print_scope import print_scope
from nmlightning.callbacks.provenance import describe_run
from nmlightning.compat import CallbackBase
from nmlightning.errors import InputError
from nmlightning.weights.history import NormHistory
from nmlightning.weights.layer_weights import find_layer_weights
from nmlightning.weights.recorder import Recorder
from nmlightning.weights.recording_file import FILE_NAME
from nmlightning.weights.steering import Steering
from nmlightning.weights.steering.attachment import Attachment

if TYPE_CHECKING:
    import pytorch_lightning as pl


class WeightNormTracker(CallbackBase):
    """Records the norm of every output channel of every convolution and linear layer.

    The recording is `weight_norms.safetensors` in the run's folder, with or without a logger. It is
    written at the end of every epoch and with every checkpoint, at once or not at all; a resumed
    run goes on with the records of the one before it. Read it with `nmlightning.NormHistory`.

    Args:
        every: record at the start and the end of each "epoch", or at every N-th optimizer step too.
        steering: what moves the weights by a recording, or by a rule: `LRCorrection`,
            `NormSchedule` or `DecayEquivalentLR`; None only records. A reference may be the folder
            of an experiment, `runs/wd_on`; it then is its latest run with the seed of this one.
        include: glob patterns on weight names to record, such as `net.layer1.*`; empty means all.
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
        check_steering(steering)
        self.every = every
        self.steering = steering
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self.other_run = other_run
        self.log_norms = log_norms
        self.path: Path | None = None
        self.attachments: list[Attachment] = []
        self._recorder: Recorder | None = None
        self._dashboard: NormDashboard | None = None
        self._rates: dict[int, tuple[float, float]] = {}
        self._resumed: Mapping[str, Any] = {}
        self._batch = 0
        self._writes = False
        self._told = False

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Take the first record, and steer from the first step on."""
        weights = find_layer_weights(pl_module, self.include, self.exclude)
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        earlier = self._earlier_records()
        self._writes = trainer.is_global_zero
        self.path = trainer.strategy.broadcast(_free_file(folder))
        self._recorder = Recorder(weights, describe_run(trainer, folder), earlier)
        for optimizer in trainer.optimizers:
            self._note_rates(optimizer)
        self._record(trainer)
        self._steer(trainer, pl_module)
        if self._logs(trainer):
            self._dashboard = NormDashboard(trainer, weights)
        self._resumed = {}

    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Note how far the epoch is; the batches of one step have the place of the first."""
        self._batch = batch_idx - batch_idx % trainer.accumulate_grad_batches

    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        """Note the rates of this step, which a scheduler may change before it is recorded.

        And measure the gradients before they are clipped.
        """
        self._note_rates(optimizer)
        for attachment in self.attachments:
            attachment.measure()
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
        if all(attachment.measured for attachment in self.attachments):
            self._print_scope(trainer, pl_module)
        if self.every != "epoch" and trainer.global_step % int(self.every) == 0:
            self._record(trainer)
        if self._dashboard is not None:
            self._dashboard.after_batch(self.attachments)

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Record, write and show."""
        self._print_scope(trainer, pl_module)  # a weight without gradients is never measured
        for attachment in self.attachments:
            attachment.look()
        self._record(trainer)
        self._save()
        if self._dashboard is not None and self._recorder is not None:
            self._dashboard.end_epoch(self._recorder.history())

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Let the optimizers step freely again."""
        self._detach()

    def on_exception(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException
    ) -> None:
        """Let the optimizers step freely again."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """Return where the records are and what steers, for the run that goes on from here."""
        if self._recorder is None:
            return dict(self._resumed)
        self._save()
        return {
            "file": str(self.path),
            "step": self._recorder.last_step,
            "steering": [attachment.state_dict() for attachment in self.attachments],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the records and the steering of a checkpoint."""
        self._resumed = state_dict

    def _steer(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        states = self._resumed.get("steering", [])
        goes_on = trainer.global_step > 0 and not self.attachments
        if self.steering is not None:
            self.attachments = attach_steering(
                trainer, pl_module, self.steering, other_run=self.other_run
            )
        if states or goes_on:
            resume_steering(self.attachments, states, trainer.global_step)
        for attachment in self.attachments:
            attachment.clock = lambda: {"epoch": self._moment(trainer)}

    def _print_scope(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self.steering is not None and not self._told:
            self._told = True
            print_scope(self.steering, self.attachments, pl_module, trainer.optimizers)

    def _moment(self, trainer: "pl.Trainer") -> float:
        batches = trainer.num_training_batches
        return trainer.current_epoch + min(self._batch / batches, 1 - 1e-9)

    def _earlier_records(self) -> NormHistory | None:
        if "file" not in self._resumed:
            return None
        file = Path(self._resumed["file"])
        if not file.is_file():
            warnings.warn(
                f"The recording that the checkpoint goes on with is gone: {file}. The new one "
                f"starts at step {self._resumed['step']}.",
                stacklevel=2,
            )
            return None
        return NormHistory.load(file, finite=False).until(int(self._resumed["step"]))

    def _note_rates(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            rates = float(group["lr"]), float(group.get("weight_decay", 0.0))
            self._rates.update((id(parameter), rates) for parameter in group["params"])

    def _record(self, trainer: "pl.Trainer") -> None:
        assert self._recorder is not None, "the fit has started"
        self._recorder.record(trainer.global_step, trainer.current_epoch, self._rates)

    def _save(self) -> None:
        if self._writes and self._recorder is not None and self.path is not None:
            self._recorder.save(self.path)

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
        for attachment in self.attachments:
            attachment.remove()


def _free_file(folder: Path) -> Path:
    """Return a file name in `folder` that nothing has yet."""
    stem, suffix = FILE_NAME.split(".")
    names = (FILE_NAME, *(f"{stem}-v{version}.{suffix}" for version in range(1, 10_000)))
    return next(folder / name for name in names if not (folder / name).exists())
