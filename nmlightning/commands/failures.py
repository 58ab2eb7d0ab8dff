"""What a run that fails says: a line for what the user gave, a traceback for what nobody expected.

torch, Lightning and others complain in exceptions of every kind. A complaint before the first epoch
is done, or from what only configures, with no code of the user's own on the way, is of the config.
What others say of a run that does not fail is filtered here, too, but not under another Trainer.
"""

import logging
import pickle
import re
import subprocess
import sys
import sysconfig
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from pytorch_lightning import Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from nmlightning.callbacks.checkpoints import ANEW
from nmlightning.commands import run_report
from nmlightning.commands.argument_parser import LOST_PROCESS, print_words
from nmlightning.errors import InputError, input_error_in

SECONDS_TO_END = 10  # for a launched process that is about to say what went wrong
# What gloo says of a process that is gone or silent; NCCL and the store have exceptions for it.
_LOSSES = "gloo.*(closed by peer|reset by peer|Broken pipe|Timed out waiting)|^Application timeout"

_PACKAGE = Path(__file__).parents[1]
_LIBRARIES = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib")]
_SITE = _LIBRARIES[0]
# Who complains at any time of a name, a schedule or an interval, rather than of numbers.
_CONFIGURED = [
    *(_SITE / name for name in ("pytorch_lightning", "lightning", "lightning_fabric")),
    *(_SITE / name for name in ("torchmetrics", "torch/optim", "torch/nn/utils")),
]
_COMPLAINTS = (
    *(RuntimeError, ValueError, TypeError, LookupError, ArithmeticError),
    *(AttributeError, ImportError, AssertionError),
)
_RESTORES = re.compile(r"load_.*state|load_checkpoint|restore")
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "Storage size calculation overflow")


@contextmanager
def explain_failures(is_start: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Turn what the body raises because of what the user gave into an InputError of one line."""
    try:
        yield
    except Exception as error:
        line = None if input_error_in(error) else explain(error, is_start())
        if line is None:
            raise
        raise InputError(line) from error


def explain(error: Exception, is_start: bool) -> str | None:
    """Return the line for an exception that the user's input accounts for, else None."""
    message = " ".join(str(error).split()).partition(" Exception raised from ")[0]
    tried = re.search(
        "Union subtypes .*?Errors: - (.*?) - (?:Expected|Not a valid)", message
    )  # by jsonargparse
    message = (tried[1] if tried else message)[:400]
    if isinstance(error, KeyError) and " " not in message:
        message = f"there is no {message}"
    is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if is_memory or any(text in message for text in _OUT_OF_MEMORY):
        return f"there is not enough memory; a smaller network, image or batch may fit: {message}"
    if isinstance(error, pickle.UnpicklingError):
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        return (
            f"the checkpoint holds objects{f' such as {named[1]}' if named else ''}, which may run "
            "code: give --weights_only false if you trust it."
        )
    if isinstance(error, MisconfigurationException):
        return message
    frames = traceback.extract_tb(error.__traceback__)
    last = next(frame for frame in reversed(frames) if frame.name != "__getattr__")
    is_known = all(_is_below(Path(frame.filename), _PACKAGE, *_LIBRARIES) for frame in frames)
    if not (is_known and (is_start or _is_below(Path(last.filename), *_CONFIGURED))):
        return None
    where = f"{message or repr(error)} (in {last.name} of {Path(last.filename).name}:{last.lineno})"
    if any(_RESTORES.search(frame.name) for frame in frames):
        if "contains only the model" in message:
            return f"the checkpoint has weights only: give one of the whole run, {ANEW}"
        return f"the checkpoint is damaged, or of another model or optimizer: {where}"
    if isinstance(error, _COMPLAINTS) and not _is_below(Path(last.filename), _PACKAGE):
        return f"these settings do not work together: {where}"
    return None


def _is_below(file: Path, *folders: Path) -> bool:
    """Return whether a file is in one of the folders, or is made up, as `<string>` is."""
    return file.name.startswith("<") or any(folder in file.parents for folder in folders)


def stop_launched_processes(trainer: Trainer) -> None:
    """End the processes that Lightning started, which it leaves running after an exception.

    On a GPU they may wait inside a collective, where no other signal reaches them.
    """
    launched: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
    deadline = time.monotonic() + SECONDS_TO_END
    for process in launched:
        try:
            process.wait(timeout=max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


@contextmanager
def failing_together(
    trainer: Trainer, checkpoint: Callable[[], Path | str | None]
) -> Iterator[None]:
    """Say in a line that another process is lost, and what is kept, and leave none running."""
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
    """Return True for what a collective raises when another process is gone or silent."""
    text = str(error)
    if isinstance(error, dist.DistError):
        return "EADDRINUSE" not in text  # where there is no other process yet
    return isinstance(error, RuntimeError) and bool(re.search(_LOSSES, text, re.DOTALL))


# Pieces of warnings, as regular expressions for the beginning of the text.
IGNORED_WARNINGS = [
    # Our images lie in memory; workers would copy what is already there.
    r"The '\w+' does not have many workers",
    # Every fit has a folder of its own, so a resumed run never finds its old one.
    r"The dirpath has changed from",
    # The chosen precision is announced once, by ourselves.
    r"You passed `Trainer\(accelerator='cpu', precision='16-mixed'\)`",
    # The summary then counts 32 bits a parameter, which is what mixed precision keeps.
    r"Precision bf16-mixed is not supported by the model summary",
    # Ten digits batches an epoch are fewer than the 50 steps between two log entries.
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    # Lightning asks torch for the leaves of a tree in the old way; nothing the user wrote.
    r".*isinstance\(treespec, LeafSpec\).* is deprecated",
    # A run resumed after its last epoch has nothing left to do, which the table shows.
    r"You're resuming from a checkpoint that ended before the epoch ended",
]
# Advertisements, a line for each kind of device, and what the report says again: all below WARNING.
_LOGGERS = [
    *("pytorch_lightning", "lightning_fabric"),
    *("lightning", "lightning.pytorch", "lightning.fabric"),
]
# They say through Lightning's loggers what was swapped or normalised, how the learning rate was
# scaled, and the BLEU to publish.
OWN_MESSAGES = ("NormSwap", "WeightNormSwap", "Int8Swap", "ImageClassifier", "Translator")


@contextmanager
def filter_logs() -> Iterator[None]:
    """Leave out what is listed above, and nothing else, while the body runs."""
    handlers = filtered_handlers()
    with warnings.catch_warnings():
        for message in IGNORED_WARNINGS:
            warnings.filterwarnings("ignore", message)
        # LightningCLI calls jsonargparse by names that jsonargparse will drop in version 5.
        warnings.filterwarnings(
            "ignore", category=DeprecationWarning, module="pytorch_lightning.cli"
        )
        for handler in handlers:
            handler.addFilter(_is_kept)
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(_is_kept)


def filtered_handlers() -> list[logging.Handler]:
    """Return the handlers of Lightning's loggers."""
    return [handler for name in _LOGGERS for handler in logging.getLogger(name).handlers]


def _is_kept(record: logging.LogRecord) -> bool:
    """Print our own message, which a handler would write into the progress bar; keep warnings."""
    text = record.getMessage()
    if record.levelno < logging.WARNING and text.startswith(OWN_MESSAGES):
        print_words(text, sys.stderr)
    return record.levelno >= logging.WARNING
