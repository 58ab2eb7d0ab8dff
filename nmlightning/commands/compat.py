"""The private touches of LightningCLI and its Trainer, tested in tests/test_cli.py and on ranks."""

import subprocess
import time

from pytorch_lightning import Trainer
from pytorch_lightning.cli import LightningCLI

_SECONDS_TO_END = 10  # for a process that is about to say what went wrong


class ExplicitOptionsWin(LightningCLI):
    """LightningCLI that leaves the options as they were parsed.

    Lightning 2.6 overwrites them with a checkpoint's `hyper_parameters` after parsing, so that an
    option on the command line has no effect with `--ckpt_path`. `nm` parses the checkpoint's first.
    """

    def _parse_ckpt_path(self) -> None:
        pass


def stop_launched_processes(trainer: Trainer) -> None:
    """End the processes that Lightning started, which it leaves running after an exception.

    On a GPU they may wait inside a collective, where no other signal reaches them.
    """
    launched: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
    deadline = time.monotonic() + _SECONDS_TO_END
    for process in launched:
        try:
            process.wait(timeout=max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
