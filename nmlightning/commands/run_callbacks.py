"""The callbacks that every `nm` run has, unless the user's options bring their own."""

from typing import Any

from jsonargparse import Namespace
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint, RichProgressBar
from pytorch_lightning.callbacks.progress import ProgressBar

from nmlightning.callbacks.skipped_step_count import SkippedStepCount


def standard_callbacks(options: Namespace) -> list[Callback]:
    """Return what the Trainer's `options` leave open: the progress bar and the last checkpoint."""
    given = given_callbacks(options)
    added: list[Callback] = []
    if not options.barebones:
        added.append(SkippedStepCount())
    if not (any(isinstance(c, ProgressBar) for c in given) or _off(options, "progress_bar")):
        added.append(MetricsBar())
    if not (any(_keeps_last(c) for c in given) or _off(options, "checkpointing")):
        # One file that each epoch replaces; save_last would write everything twice.
        added.append(
            ModelCheckpoint(
                filename="last", save_on_train_epoch_end=True, enable_version_counter=False
            )
        )
    return added


def given_callbacks(options: Namespace) -> list[Callback]:
    """Return the callbacks in the Trainer's `options`, where one need not be in a list."""
    callbacks = options.callbacks or []
    return callbacks if isinstance(callbacks, list) else [callbacks]


class MetricsBar(RichProgressBar):
    """Lightning's rich progress bar; the version is said once above it, not in every line."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the metrics that the module logs for the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num"}


def _off(options: Namespace, what: str) -> bool:
    return options[f"enable_{what}"] is False or options.barebones


def _keeps_last(callback: Callback) -> bool:
    return isinstance(callback, ModelCheckpoint) and bool(
        callback.save_last or callback.monitor is None
    )
