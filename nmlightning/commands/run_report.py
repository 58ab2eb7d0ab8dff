"""The report of a run: its size, progress, duration and results, and the commands for it.

Only the first of several processes prints.
"""

import math
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.callbacks import ProgressBar, Timer
from pytorch_lightning.utilities.model_helpers import is_overridden
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar as RichBar
from rich.table import Column, Table
from rich.text import Text
from torch.nn.parameter import is_lazy

from nmlightning.allocator import keep_freed_memory
from nmlightning.callbacks.epoch_clock import SkippedSteps
from nmlightning.commands.argument_parser import command_to_copy, print_line, print_words
from nmlightning.compat import epochs_to_train
from nmlightning.errors import repr_by_arguments
from nmlightning.reports.formatting import Grid, format_seconds, format_value, show
from nmlightning.reports.run import has_events
from nmlightning.surgery.norm_layers import is_norm

STAGES = ("train", "val", "test")
_TIMED_STEPS = (2, 10)  # between which steps are timed: compilation is in those before
_WORTH_A_LINE = 30  # seconds
_REFRESH_SECONDS = 0.5


class Stopwatch(Callback):
    """Count the batches, the examples and the seconds of training, without its validation.

    After ten steps it says how long all will take, if that is over half a minute.
    """

    epochs = steps = examples = 0
    last_loss: Any = 0.0
    training_seconds = total_seconds = 0.0
    __repr__ = repr_by_arguments
    folder: Path | None = None  # of the run
    keeps_freed_memory = True
    _fit_started = _resumed = _timed_from = 0.0
    _validation_batch: float | None = None  # seconds of the last one in a sanity check

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep freed memory before there are activations to free; a GPU's are not in it."""
        if self.keeps_freed_memory and isinstance(trainer.accelerator, CPUAccelerator):
            keep_freed_memory()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fit_started = self._resumed = time.monotonic()
        print_start(trainer, pl_module, self.folder)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resumed = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps += 1
        if isinstance(outputs, Mapping):  # what the training step returned, if it did
            self.last_loss = outputs.get("loss", 0.0)
        if isinstance(batch, (tuple, list)):
            self.examples += len(batch[0]) * trainer.world_size
        if self.steps in _TIMED_STEPS:
            float(self.last_loss)  # wait for the device
            self._pause()
            if self.steps == _TIMED_STEPS[0]:
                self._timed_from = self.training_seconds
            else:
                self._foretell(trainer, batch_idx + 1)

    def on_validation_batch_start(self, *_: Any) -> None:
        self._batch_started = time.monotonic()

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.sanity_checking:
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.synchronize()
            self._validation_batch = time.monotonic() - self._batch_started

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resumed = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()
        self.epochs += 1

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.total_seconds = time.monotonic() - self._fit_started

    def _pause(self) -> None:
        now = time.monotonic()
        self.training_seconds += now - self._resumed
        self._resumed = now

    def _foretell(self, trainer: Trainer, batches_of_epoch: int) -> None:
        """Print how long the fit will take, or what is left of it after a resume."""
        batch = (self.training_seconds - self._timed_from) / (_TIMED_STEPS[1] - _TIMED_STEPS[0])
        train, val = batches_left(trainer, batches_of_epoch)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        ends = [c.time_remaining() for c in callbacks if isinstance(c, Timer)]
        left = train * batch + val * (self._validation_batch or batch)
        left = min([left, *(seconds for seconds in ends if seconds is not None)])
        whole = time.monotonic() - self._fit_started + left
        if _WORTH_A_LINE < whole < math.inf:
            what = "the rest of the fit" if trainer.ckpt_path else "the whole fit"
            batches = f"{train + self.steps:,.0f} batches of training, {val:,.0f} of validation"
            print_notice(f"{what} takes about {format_seconds(round(whole))}: {batches}.")


def batches_left(trainer: Trainer, batches_of_epoch: int) -> tuple[float, float]:
    """Return how many batches of training and of validation are to come; ∞ if nothing ends them."""
    epochs, limits = epochs_to_train(trainer), [math.inf]
    if epochs is not None:
        batches = (epochs - trainer.current_epoch) * trainer.num_training_batches
        limits.append(batches - batches_of_epoch)
    if trainer.max_steps > 0:
        steps = trainer.max_steps - trainer.global_step
        limits.append(steps * trainer.accumulate_grad_batches)
    every = (trainer.val_check_batch or math.inf) * (trainer.check_val_every_n_epoch or 1)
    train = min(limits)
    validations = round(train / every) if train < math.inf else 0
    return train, validations * sum(trainer.num_val_batches)


class MetricsBar(ProgressBar):
    """A line for the batches; below it the loss of the last one and the metrics.

    It reads them twice a second, since each reading waits for the device, where Lightning's bar
    does so in every step. What it shows is erased when it ends.
    """

    __repr__ = repr_by_arguments

    def __init__(self) -> None:
        super().__init__()
        self._console = Console()
        self._live: Live | None = None
        self._is_enabled = True
        self._loss: Any = None
        self._metrics = self._stage = ""
        self._done: tuple[int, float] = 0, math.inf  # batches, of how many
        self._total = math.inf  # batches of this epoch; Lightning's figure falls towards max_steps
        self._began = 0, 0.0  # with which batch, and when, the stage did
        self._drawn = 0.0  # when

    def disable(self) -> None:
        self._is_enabled = False

    def enable(self) -> None:
        self._is_enabled = True

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the loss of the last batch and what the module logs for the bar, no version."""
        metrics: dict[str, Any] = {}
        if self._loss is not None:  # which Lightning divides for gradients that add up
            count = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            metrics["loss"] = float(self._loss) * count
        metrics |= super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num"}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = trainer.num_training_batches
        done = int(trainer.fit_loop.epoch_loop.batch_progress.current.ready % batches)
        self._total = min(batches, done + batches_left(trainer, done)[0])
        self._show(trainer, done, self._total)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(outputs, Mapping):
            self._loss = outputs.get("loss")
        self._show(trainer, batch_idx + 1, self._total, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.has_dataloader_changed(dataloader_idx)  # whose total is asked for
        part = trainer.state.stage.dataloader_prefix  # type: ignore[union-attr]
        total = getattr(self, f"total_{part}_batches_current_dataloader")
        self._show(trainer, batch_idx + 1, total)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def _stop(self, *_: Any, **__: Any) -> None:
        if self._live is not None:
            self._live.stop()
        self._live = None

    teardown = on_exception = _stop

    def _show(
        self, trainer: Trainer, done: int, total: float, module: LightningModule | None = None
    ) -> None:
        now, stage = time.monotonic(), str(trainer.state.stage.value).replace("_", " ").capitalize()  # type: ignore[union-attr]
        if trainer.training:
            last = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
            stage = f"Epoch {trainer.current_epoch + 1}{last}"
        self._done = done, total
        if stage != self._stage:
            self._stage, self._began, self._drawn = stage, (done, now), 0.0
        is_early = now < self._drawn + _REFRESH_SECONDS
        if is_early or not (self._is_enabled and self._console.is_terminal):
            return
        if module is not None:
            metrics = self.get_metrics(trainer, module).items()
            shown = (f"{k}={x:.3f}" if isinstance(x, float) else f"{k}={x}" for k, x in metrics)
            self._metrics = "  ".join(shown)
        if self._live is None:
            options: dict[str, Any] = {"auto_refresh": False, "transient": True}
            self._live = Live(console=self._console, get_renderable=self._render, **options)
            self._live.start()
        self._live.refresh()
        self._drawn = time.monotonic()

    def _render(self) -> Group:
        (done, total), (first, began) = self._done, self._began
        of = f"/{total:.0f}" if total < math.inf else ""
        speed = (done - first) / (time.monotonic() - began)
        left = f" · {format_seconds((total - done) / speed)} left" if of and speed else ""
        row = Table.grid(Column(), Column(ratio=1), Column(), padding=(0, 1), expand=True)
        bar = RichBar(total if of else 1, done, pulse=not of)
        row.add_row(self._stage, bar, f"{done}{of}{left}")
        return Group(row, Text(self._metrics, style="italic"))


class SkippedStepCount(Callback):
    """Logs `train/skipped_steps` after each epoch, where a GradScaler may skip any.

    It is the number of optimizer steps since training began, also before a resume, whose gradients
    overflowed. A few at the start, while the scale is found, are normal; a growing number is not.
    """

    _earlier = 0
    _skipped: SkippedSteps | None = None
    __repr__ = repr_by_arguments

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        skipped = SkippedSteps(trainer)
        if skipped.watches:
            skipped.resume_from(self._earlier)
            self._skipped = skipped

    def on_before_optimizer_step(self, *_: Any) -> None:
        if self._skipped is not None:
            self._skipped.attempt()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._skipped is not None:
            pl_module.log("train/skipped_steps", self._skipped.count(), prog_bar=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._skipped is not None:
            self._earlier = int(self._skipped.count())
            self._skipped.remove()
            self._skipped = None

    def state_dict(self) -> dict[str, Any]:
        count = self._earlier if self._skipped is None else int(self._skipped.count())
        return {"skipped_steps": count}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._earlier = state_dict["skipped_steps"]


@rank_zero_only
def print_start(trainer: Trainer, module: LightningModule, run: Path | None) -> None:
    """Print what is trained, in which precision, on which device, and where it is kept."""
    count = sum(p.numel() for p in module.parameters() if not is_lazy(p))
    kinds = Counter(type(part).__name__ for part in module.modules() if is_norm(part))
    norms = " + ".join(f"{n} {kind}" for kind, n in kinds.items()) or "no norms"
    copies = f" × {trainer.world_size}" if trainer.world_size > 1 else ""
    device = f"{trainer.strategy.root_device.type}{copies}"
    kept = f" → {run}" if run else ""
    size = f"{count / 1e3:,.0f} K" if count < 1e6 else f"{count / 1e6:,.1f} M"
    print_words(f"nm: {size} parameters, {norms}, {trainer.precision}, {device}{kept}")


@rank_zero_only
def print_fit(
    trainer: Trainer, watch: Stopwatch, run: Path | None, checkpoint: Path | None
) -> None:
    """Print the table of results, the cost, and the paths of the run and what is in it."""
    from nmlightning.callbacks import WeightNormTracker

    print()
    print_metrics(trainer.callback_metrics)
    earlier = trainer.current_epoch - watch.epochs
    after = f" after {earlier} of an earlier run" if earlier > 0 else ""
    speed = ""
    if watch.examples:
        unit = getattr(getattr(trainer, "datamodule", None), "unit", "images")
        speed = f" · {watch.examples / watch.training_seconds:,.0f} {unit}/s"
    took = format_seconds(watch.total_seconds)
    epochs = f"{watch.epochs} epoch{'s' * (watch.epochs != 1)}"
    print_words(f" {epochs}{after} in {took}{speed} in training")
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # a connector sets them
    recordings = [c.path for c in callbacks if isinstance(c, WeightNormTracker) and c.path]
    print_paths(run=run, checkpoint=checkpoint, norms=next(iter(recordings), None))
    if run is None:
        return
    print()  # and how to look at it, and to measure it
    for command in ("dashboard",) * has_events(run) + ("compare",) * bool(trainer.loggers):
        print(command_to_copy("nm", command, str(run)))
    config = run / "config.yaml"
    if checkpoint and config.is_file():
        data = getattr(trainer, "datamodule", None) or trainer.lightning_module
        measure = "test" if is_overridden("test_dataloader", data) else "validate"
        words = ("--config", str(config), "--ckpt_path", str(checkpoint))
        print(command_to_copy("nm", measure, *words))


@rank_zero_only
def print_paths(**paths: Path | str | None) -> None:
    for name, path in paths.items():
        if path:
            print_line(name, path)


@rank_zero_only
def print_interruption(run: Path | None, checkpoint: Path | None) -> None:
    """Say which checkpoint an interrupted run leaves, and the command that resumes it."""
    if checkpoint is None:
        print_notice("interrupted; no checkpoint exists yet.")
    elif run is None or not (config := run / "config.yaml").is_file():
        print_notice(f"interrupted; the last checkpoint is {checkpoint}")
    else:
        print_notice("interrupted; the last checkpoint is kept. To resume:")
        words = ("nm", "fit", "--config", str(config), "--ckpt_path", str(checkpoint))
        print(command_to_copy(*words), file=sys.stderr)


def print_loss(rank: int, error: str, checkpoint: Path | str | None) -> None:
    """Say, in each process that is left, that another is lost, and what can be resumed."""
    name = f"nm (rank {rank})"
    kept = f"the last checkpoint is {checkpoint}" if checkpoint else "no checkpoint exists yet"
    print_words(f"{name}: lost another process, which may have said why. Here: {error}", sys.stderr)
    print_words(f"{name}: {kept}.", sys.stderr)


@rank_zero_only
def print_notice(text: str) -> None:
    """Print one line to stderr about something that runs otherwise than asked."""
    print_words(f"nm: {text}", sys.stderr)


@rank_zero_only
def print_metrics(metrics: Mapping[str, Any]) -> None:
    """Print the metrics called `<stage>/<name>`: a row a stage, a column a name, none of a step."""
    kept = {k: x for k, x in metrics.items() if k.count("/") == 1 and not k.endswith("_step")}
    values = {name: float(value) for name, value in kept.items()}
    shown = (name.split("/") for name in values)
    names = list(dict.fromkeys(name for stage, name in shown if stage in STAGES))
    rows = [stage for stage in STAGES if any(name.startswith(f"{stage}/") for name in values)]
    if not rows:
        return
    texts = {tag: format_value(value, tag) for tag, value in values.items()}
    cells = [[stage, *(texts.get(f"{stage}/{name}", "") for name in names)] for stage in rows]
    show(Grid(["", *names], cells, numbers=True))
