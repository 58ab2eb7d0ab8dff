"""Numbers and pictures for whatever loggers a Trainer has; pictures go to TensorBoard's only."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tensorboard.compat.proto.summary_pb2 import Summary

if TYPE_CHECKING:
    import pytorch_lightning as pl


def log_scalars(trainer: "pl.Trainer", values: Mapping[str, float], step: int) -> None:
    """Log all values under their tags, in TensorBoard as a single event: many are cheap so."""
    for logger in trainer.loggers:
        writer = _tensorboard_writer(logger)
        if writer is None:
            logger.log_metrics(dict(values), step)
        else:
            points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
            writer._get_file_writer().add_summary(Summary(value=points), step)


def tensorboard_writers(trainer: "pl.Trainer") -> list[Any]:
    """Return the SummaryWriter of each TensorBoard logger."""
    writers = [_tensorboard_writer(logger) for logger in trainer.loggers]
    return [writer for writer in writers if writer is not None]


def _tensorboard_writer(logger: Any) -> Any | None:
    experiment = getattr(logger, "experiment", None)
    return experiment if hasattr(experiment, "add_custom_scalars") else None
