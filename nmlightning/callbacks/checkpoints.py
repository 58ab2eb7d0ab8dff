"""Checkpoints that are written whole or not at all, and one of the end of a fit."""

from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.request import urlopen

import torch

from nmlightning.atomic_file import remove_drafts, replace_file
from nmlightning.compat import CallbackBase, CheckpointIOBase
from nmlightning.errors import InputError

if TYPE_CHECKING:
    import pytorch_lightning as pl

_WEB = ("http://", "https://")


class AtomicCheckpointIO(CheckpointIOBase):
    """Writes a checkpoint beside its target, on the disk, and then gives it the target's name.

    Lightning's own writes into the temporary folder and, where that is on another file system,
    copies over the checkpoint that is there: a process that is killed meanwhile, or a full disk,
    leaves neither the old one nor the new. With this one the old one is whole until the new one is.
    Other places than files, such as `s3://…`, are written as Lightning does.

    Of a checkpoint at a web address nothing is kept, and no pickled object in it is loaded.

    Raises:
        InputError: the file cannot be written, such as on a full disk, or the address not read.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(plugins=[AtomicCheckpointIO()], logger=False)
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write the checkpoint at once, or not at all."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; one at a web address anew each time, as it may be another by now."""
        if not str(path).startswith(_WEB):
            loaded: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only)
            return loaded
        with TemporaryFile() as file:
            try:
                with urlopen(str(path)) as content:
                    while chunk := content.read(1 << 24):
                        file.write(chunk)
            except (URLError, OSError) as error:
                raise InputError(f"the checkpoint {path} cannot be read: {error}.") from error
            file.seek(0)
            whole: dict[str, Any] = torch.load(file, map_location, weights_only=weights_only)
            return whole


class EndCheckpoint(CallbackBase):
    """Keeps the end of a fit as `last.ckpt` where no other callback has a checkpoint of its step.

    Attributes:
        step: of the last checkpoint, or else that the fit started at.
    """

    step = 0

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Delete what killed processes left of files in the runs beside this one."""
        if trainer.is_global_zero and end_checkpoint(trainer):
            remove_drafts(Path(str(trainer.log_dir)).parent, below=True)

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self.step = trainer.global_step

    def on_save_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        self.step = trainer.global_step

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Save, before other callbacks put averaged weights into the module."""
        file = end_checkpoint(trainer)
        if file and self.step != trainer.global_step:
            trainer.save_checkpoint(file)


def end_checkpoint(trainer: "pl.Trainer") -> Path | None:
    """Return where the end of a fit is kept, None where there are no checkpoints."""
    if not trainer.checkpoint_callbacks or trainer.fast_dev_run or not trainer.log_dir:  # type: ignore[attr-defined]
        return None
    return Path(trainer.log_dir) / "checkpoints" / "last.ckpt"
