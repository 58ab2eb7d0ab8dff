"""The report of a run: its folder, its results, how to resume; and the filters of other messages.

Only the first of several processes prints. Under another Trainer nothing is filtered.
"""

import logging
import shlex
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nmlightning.callbacks.epoch_clock import SkippedSteps
from nmlightning.reports.formatting import format_seconds, format_value

STAGES = ("train", "val", "test")


class Stopwatch(Callback):
    """Count the batches, the examples and the seconds of training, without its validation."""

    epochs = steps = examples = 0
    last_loss: Any = 0.0
    training_seconds = total_seconds = 0.0
    _fit_started = _resumed = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fit_started = self._resumed = time.monotonic()

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


class SkippedStepCount(Callback):
    """Logs `train/skipped_steps` after each epoch, where a GradScaler may skip any.

    It is the number of optimizer steps since training began, also before a resume, whose gradients
    overflowed. A few at the start, while the scale is found, are normal; a growing number is not.
    """

    _earlier = 0
    _skipped: SkippedSteps | None = None

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
def print_start(trainer: Trainer, run: Path | None) -> None:
    kept = f" → {escape(str(run))}" if run else ""
    device = trainer.strategy.root_device
    copies = f" × {trainer.world_size}" if trainer.world_size > 1 else ""
    _print(f"[bold]nm[/bold]: {device.type}{copies}, precision {trainer.precision}{kept}")


@rank_zero_only
def print_fit(
    trainer: Trainer, watch: Stopwatch, run: Path | None, checkpoint: Path | None
) -> None:
    """Print the table of results, the cost, and the paths of the run and its last checkpoint."""
    _print()
    print_metrics(trainer.callback_metrics)
    earlier = trainer.current_epoch - watch.epochs
    after = f" after {earlier} of an earlier run" if earlier > 0 else ""
    speed = ""
    if watch.examples:
        unit = getattr(getattr(trainer, "datamodule", None), "unit", "images")
        speed = f" · {watch.examples / watch.training_seconds:,.0f} {unit}/s"
    took = format_seconds(watch.total_seconds)
    _print(f" {watch.epochs} epoch{'s' * (watch.epochs != 1)}{after} in {took}{speed} in training")
    print_paths(run=run, checkpoint=checkpoint)


@rank_zero_only
def print_paths(**paths: Path | str | None) -> None:
    """Print one line for each path that there is."""
    for name, path in paths.items():
        if path:
            _print(f" {name:<11} {escape(str(path))}")


@rank_zero_only
def print_interruption(run: Path | None, checkpoint: Path | None) -> None:
    """Say which checkpoint an interrupted run leaves, and the command that resumes it."""
    config = run / "config.yaml" if run else None
    if checkpoint is None:
        text = "interrupted; no checkpoint exists yet."
    elif config is None or not config.is_file():
        text = f"interrupted; the last checkpoint is {checkpoint}"
    else:
        words = ["nm", "fit", "--config", str(config), "--ckpt_path", str(checkpoint)]
        text = f"interrupted; the last checkpoint is kept. To resume:\n{shlex.join(words)}"
    print_notice(text)


def print_loss(rank: int, error: str, checkpoint: Path | str | None) -> None:
    """Say, in each process that is left, that another is lost, and what can be resumed."""
    name = f"nm (rank {rank})"
    kept = f"the last checkpoint is {checkpoint}" if checkpoint else "no checkpoint exists yet"
    text = f"{name}: lost another process, which may have said why. Here: {error}\n{name}: {kept}."
    Console(stderr=True).print(text, soft_wrap=True, highlight=False, markup=False)


@rank_zero_only
def print_notice(text: str) -> None:
    """Print one line to stderr about something that runs otherwise than asked."""
    Console(stderr=True).print(f"nm: {text}", soft_wrap=True, highlight=False, markup=False)


@rank_zero_only
def print_metrics(metrics: Mapping[str, Any]) -> None:
    """Print the metrics called `<stage>/<name>`: a row a stage, a column a name."""
    values = {name: float(value) for name, value in metrics.items() if name.count("/") == 1}
    shown = (name.split("/") for name in values)
    names = list(dict.fromkeys(name for stage, name in shown if stage in STAGES))
    rows = [stage for stage in STAGES if any(name.startswith(f"{stage}/") for name in values)]
    if not rows:
        return
    table = Table()
    table.add_column("")
    for name in names:
        table.add_column(escape(name), justify="right")
    for stage in rows:
        tags = [f"{stage}/{name}" for name in names]
        table.add_row(stage, *(format_value(values[t], t) if t in values else "" for t in tags))
    Console().print(table)


def _print(text: str = "") -> None:
    # Paths are to be copied: never wrapped.
    Console().print(text, soft_wrap=True, highlight=False)


# Pieces of warnings, as regular expressions for the beginning of the text.
IGNORED_WARNINGS = [
    # Our images lie in memory; workers would copy what is already there.
    r"The '\w+' does not have many workers",
    # Every fit has a folder of its own, so a resumed run never finds its old one.
    r"The dirpath has changed from",
    # The chosen precision is announced once, by ourselves.
    r"You passed `Trainer\(accelerator='cpu', precision='16-mixed'\)`",
    # The summary then counts 32 bits a parameter, which is what mixed precision keeps.
    r"Precision bf16-mixed is not supported by the model summary",
    # Ten digits batches an epoch are fewer than the 50 steps between two log entries.
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    # Lightning asks torch for the leaves of a tree in the old way; nothing the user wrote.
    r".*isinstance\(treespec, LeafSpec\).* is deprecated",
    # A run resumed after its last epoch has nothing left to do, which the table shows.
    r"You're resuming from a checkpoint that ended before the epoch ended",
]
# Advertisements, a line for each kind of device, and what the report says again: all below WARNING.
_LOGGERS = [
    *("pytorch_lightning", "lightning_fabric"),
    *("lightning", "lightning.pytorch", "lightning.fabric"),
]
# They say through Lightning's loggers what was swapped or normalised, how the learning rate was
# scaled, and the BLEU to publish.
OWN_MESSAGES = ("NormSwap", "WeightNormSwap", "ImageClassifier", "Translator")


@contextmanager
def filter_logs() -> Iterator[None]:
    """Leave out what is listed above, and nothing else, while the body runs."""
    handlers = filtered_handlers()
    with warnings.catch_warnings():
        for message in IGNORED_WARNINGS:
            warnings.filterwarnings("ignore", message)
        # LightningCLI calls jsonargparse by names that jsonargparse will drop in version 5.
        warnings.filterwarnings(
            "ignore", category=DeprecationWarning, module="pytorch_lightning.cli"
        )
        for handler in handlers:
            handler.addFilter(_is_kept)
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(_is_kept)


def filtered_handlers() -> list[logging.Handler]:
    """Return the handlers of Lightning's loggers."""
    return [handler for name in _LOGGERS for handler in logging.getLogger(name).handlers]


def _is_kept(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.getMessage().startswith(OWN_MESSAGES)
