"""What Lightning and torch say that a user of `nm` can do nothing about, each with its reason.

Warnings of our own code are a line that begins with `nm:`, without the line of code. Only `nm` is
quiet: under another Trainer our callbacks and modules silence nothing.
"""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Pieces of warnings, as regular expressions for the beginning of the text.
SILENCED = [
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
CHATTY = [
    *("pytorch_lightning", "lightning_fabric"),
    *("lightning", "lightning.pytorch", "lightning.fabric"),
]
# They say through Lightning's loggers what was swapped or normalised, how the learning rate was
# scaled, and the BLEU to publish.
OURS = ("NormSwap", "WeightNormSwap", "ImageClassifier", "Translator")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what is listed above, and nothing else, while the body runs."""
    handlers = [handler for name in CHATTY for handler in logging.getLogger(name).handlers]
    with warnings.catch_warnings():
        for message in SILENCED:
            warnings.filterwarnings("ignore", message)
        # LightningCLI calls jsonargparse by names that jsonargparse will drop in version 5.
        warnings.filterwarnings(
            "ignore", category=DeprecationWarning, module="pytorch_lightning.cli"
        )
        _show_ours_as_a_line()
        for handler in handlers:
            handler.addFilter(_is_of_use)
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(_is_of_use)


def _is_of_use(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.getMessage().startswith(OURS)


def _show_ours_as_a_line() -> None:
    """Print warnings that arise in this package without place and code; the others as before."""
    package, show = Path(__file__).parents[1], warnings.showwarning

    def show_short(
        message: Warning | str, category: type[Warning], filename: str, *place: Any, **options: Any
    ) -> None:
        if package in Path(filename).parents:
            print(f"nm: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            show(message, category, filename, *place, **options)

    warnings.showwarning = show_short
