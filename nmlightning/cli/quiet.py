"""What Lightning and torch say that a user of `nm` can do nothing about, each with its reason.

Only `nm` is quiet: under another Trainer our callbacks and modules silence nothing.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Pieces of warnings, as regular expressions for the beginning of the text.
SILENCED = [
    # Our images lie in memory; workers would copy what is already there.
    r"The '\w+' does not have many workers",
    # Every fit has a folder of its own, so a resumed run never finds its old one.
    r"The dirpath has changed from",
    # The chosen precision is announced once, by ourselves.
    r"You passed `Trainer\(accelerator='cpu', precision='16-mixed'\)`",
    # Ten digits batches an epoch are fewer than the 50 steps between two log entries.
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    # Lightning asks torch for the leaves of a tree in the old way; nothing the user wrote.
    r".*isinstance\(treespec, LeafSpec\).* is deprecated",
    # A run resumed after its last epoch has nothing left to do, which the table shows.
    r"You're resuming from a checkpoint that ended before the epoch ended",
]
# Advertisements, one line per kind of device, and what the report says again: below WARNING.
CHATTY = ["pytorch_lightning", "lightning_fabric", "lightning_utilities"]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what is listed above, and nothing else, while the body runs."""
    loggers = [logging.getLogger(name) for name in CHATTY]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in SILENCED:
            warnings.filterwarnings("ignore", message)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
