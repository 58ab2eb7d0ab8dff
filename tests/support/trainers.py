"""A Trainer that says and keeps nothing, and test files run as the ranks that they test."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def quiet_trainer(*callbacks: Any, **options: Any) -> pl.Trainer:
    """Return a Trainer on the CPU, for one epoch."""
    return pl.Trainer(**{"max_epochs": 1, "callbacks": list(callbacks), **QUIET, **options})


def run_as_script(file: str, *words: object) -> None:
    """Run a test file, which then starts ranks or is one."""
    answer = subprocess.run(
        [sys.executable, file, *map(str, words)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
