"""What `nm` tells a person: where a run is kept, how it went, and how to go on.

Only the first of several processes prints.
"""

import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nmlightning.reports.words import format_seconds, format_value

STAGES = ("train", "val", "test")


class Stopwatch(Callback):
    """Count the examples and the seconds of training, without its validation."""

    def __init__(self) -> None:
        self.epochs = 0
        self.examples = 0
        self.training_seconds = 0.0
        self.total_seconds = 0.0
        self._fit_started = self._resumed = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fit_started = self._resumed = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resumed = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
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


@rank_zero_only
def print_start(trainer: Trainer, run: Path | None) -> None:
    """Print what runs on what, and where it is kept."""
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
    """Say which checkpoint an interrupted run leaves, and the command that goes on from it."""
    console = Console(stderr=True)
    config = run / "config.yaml" if run else None
    if checkpoint is None:
        text = "interrupted; no checkpoint exists yet."
    elif config is None or not config.is_file():
        text = f"interrupted; the last checkpoint is {checkpoint}"
    else:
        words = ["nm", "fit", "--config", str(config), "--ckpt_path", str(checkpoint)]
        text = f"interrupted; the last checkpoint is kept. To resume:\n{shlex.join(words)}"
    console.print(f"nm: {text}", soft_wrap=True, highlight=False, markup=False)


def print_loss(rank: int, error: str, checkpoint: Path | str | None) -> None:
    """Say, in the process of that rank, that another one is lost, and what there is to go on from.

    Every process that is left says it: rank 0 may be the one that is lost.
    """
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
        table.add_row(stage, *(_cell(f"{stage}/{name}", values) for name in names))
    Console().print(table)


def _cell(metric: str, values: Mapping[str, float]) -> str:
    return format_value(values[metric], metric) if metric in values else ""


def _print(text: str = "") -> None:
    # Paths are to be copied: never wrapped.
    Console().print(text, soft_wrap=True, highlight=False)
