"""How many steps 16-bit mixed precision skipped, in the progress bar, the logs and the report."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pytorch_lightning import Callback

from nmlightning.callbacks.skipped_steps import SkippedSteps

if TYPE_CHECKING:
    import pytorch_lightning as pl


class SkippedStepCount(Callback):
    """Logs `train/skipped_steps` after each epoch, where a GradScaler may skip any.

    It is the number of optimizer steps since training began, also before a resume, that were left
    out since gradients overflowed in half precision. A few at the start, while the scale is found,
    are normal; a number that goes on growing is not.
    """

    def __init__(self) -> None:
        self._earlier = 0
        self._skipped: SkippedSteps | None = None

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Watch the optimizers of a precision that has a GradScaler."""
        skipped = SkippedSteps(trainer)
        if skipped.watches:
            skipped.go_on_from(self._earlier)
            self._skipped = skipped

    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Any
    ) -> None:
        """Count a step that is about to be taken."""
        if self._skipped is not None:
            self._skipped.attempt()

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Log the count, for which the device is waited for."""
        if self._skipped is not None:
            pl_module.log("train/skipped_steps", self._skipped.count(), prog_bar=True)

    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Stop watching."""
        if self._skipped is not None:
            self._earlier = int(self._skipped.count())
            self._skipped.remove()
            self._skipped = None

    def state_dict(self) -> dict[str, Any]:
        """Return the count that a resumed run goes on with."""
        count = self._earlier if self._skipped is None else int(self._skipped.count())
        return {"skipped_steps": count}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._earlier = state_dict["skipped_steps"]
