"""DurableCurves: metrics that are on disk before the checkpoint that a killed run resumes from."""

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from nmlightning.compat import logged_step


class DurableCurves(Callback):
    """Logs an epoch's metrics with its checkpoint, and has TensorBoard write what it holds back.

    TensorBoard writes every two minutes, and Lightning logs an epoch's training metrics after its
    checkpoint. What was not written is lost with a process that is killed, and the next one begins
    after it.
    """

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write; what Lightning logs again under the same step is the same."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        last_step = logged_step(trainer) - 1  # which Lightning logs an epoch's metrics under
        for logger in trainer.loggers:
            logger.log_metrics({**metrics, "epoch": trainer.current_epoch}, last_step)
            logger.experiment.flush()
