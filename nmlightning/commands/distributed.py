"""Processes that train together: failing together, ending launched processes, restarts.

Lightning, torchrun or SLURM starts them, all with the same command line. The first, rank 0, keeps
the run and prints; a process that fails takes the others with it, by what this file adds to that.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.cli import LightningCLI

from nmlightning.commands import run_report
from nmlightning.commands.argument_parser import LOST_PROCESS
from nmlightning.errors import InputError

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


# What gloo says of a process that is gone or silent; NCCL and the store have exceptions for it.
_LOSSES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
)


class SameStart(Callback):
    """Refuses a fit whose processes do not all start from the same checkpoint.

    Each finds `--ckpt_path last` by itself, and one whose file system is another finds another.

    Args:
        checkpoint: what this process starts from.
    """

    def __init__(self, checkpoint: str | None) -> None:
        self.checkpoint = checkpoint

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare with the others, or raise InputError in all of them."""
        if trainer.world_size == 1 or not dist.is_initialized():
            return
        found: list[str | None] = [None] * trainer.world_size
        dist.all_gather_object(found, self.checkpoint and str(self.checkpoint))
        if len(set(found)) > 1:
            other = next(rank for rank, path in enumerate(found) if path != found[0])
            raise InputError(
                f"--ckpt_path: rank 0 starts from {found[0]}, rank {other} from {found[other]}: "
                "let all nodes share the folder of the runs, or give the path of a checkpoint."
            )


@contextmanager
def failing_together(
    trainer: Trainer, checkpoint: Callable[[], Path | str | None]
) -> Iterator[None]:
    """Say in a line that another process is lost, and leave none running that this one started.

    Args:
        trainer: what runs in the body.
        checkpoint: returns the last checkpoint that there is.

    Raises:
        SystemExit: with LOST_PROCESS, in place of what torch's collective raised.
    """
    try:
        yield
    except BaseException as error:
        lost = trainer.world_size > 1 and is_loss(error)
        if lost:
            run_report.print_loss(trainer.global_rank, str(error), checkpoint())
        stop_launched_processes(trainer)
        if lost:
            raise SystemExit(LOST_PROCESS) from None
        raise


def is_loss(error: BaseException) -> bool:
    """Whether `error` is what a collective raises when another process is gone or silent."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and "gloo" in text and any(x in text for x in _LOSSES)


def check_restarts() -> None:
    """Notice, before it is needed, that torchrun cannot restart these processes."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        run_report.print_notice(
            f"torchrun's --max-restarts {restarts} will not bring lost processes back, since new "
            "ones meet the addresses of the old (https://github.com/pytorch/pytorch/issues/135712)"
            ": set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1."
        )
