"""Short runs of the shipped configs by `nm fit`."""

import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nmlightning.cli import main

SHORT = shlex.split(
    "--trainer.accelerator cpu --trainer.max_epochs 1 --trainer.limit_train_batches 2 "
    "--trainer.limit_val_batches 1 --trainer.limit_test_batches 1 "
    "--trainer.enable_model_summary false --trainer.enable_progress_bar false"
)
DIGITS = [*SHORT, *shlex.split("--data.image_size 8 --data.batch_size 16")]
SMALL = [*DIGITS, "--model.net.depth", "8"]
LAST = Path("checkpoints/last.ckpt")


class Answer(NamedTuple):
    """What a command answered: its exit code, and what it printed, in lines or whole."""

    code: int
    out: Any
    err: Any


def fit_in(folder: Path, config: str, *words: str) -> Path:
    """Run `nm fit` in an empty folder, and return the folder of the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", config, *words]) == 0
    return folder / "runs" / config / "version_0"
