"""What is logged of training on tokens: means over the batches since it was last logged."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from nmlightning.tasks.token_loss import TokenLoss


class TrainingWindow:
    """The batches since the last one: sums on the device, so that no step waits, and a clock."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # loss, −log p, targets, tokens on both sides, batches
        self._seconds = 0.0
        self._running_since: float | None = None

    def resume(self) -> None:
        """Let the clock run: training goes on."""
        if self._running_since is None:
            self._running_since = time.monotonic()

    def pause(self) -> None:
        """Stop the clock: something else than training comes next."""
        if self._running_since is not None:
            self._seconds += time.monotonic() - self._running_since
            self._running_since = None

    def add(self, batch: TokenLoss, tokens: Tensor) -> None:
        """Add a batch, and the number of tokens that its sentences have on both sides."""
        loss, one = batch.loss.detach(), torch.ones_like(batch.loss)
        counts = (batch.tokens.float(), tokens.float(), one)
        sums = torch.stack((loss, batch.negative_log_likelihood, *counts))
        self._sums = sums if self._sums is None else self._sums + sums

    def read(self, add_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return `loss`, `ppl` and `tokens_per_s` of the batches, of which there is one at least.

        It waits for the device once.

        Args:
            add_processes: returns the sums (5,) of all processes, of those of this one.
        """
        assert self._sums is not None, "add comes first"
        loss, likelihood, targets, tokens, batches = add_processes(self._sums).tolist()
        self.pause()
        self.resume()
        return {
            "loss": loss / batches,
            "ppl": float(torch.tensor(likelihood / targets).exp()),
            "tokens_per_s": tokens / self._seconds if self._seconds else math.nan,
        }

    def clear(self) -> None:
        """Forget the batches, and the time that they took."""
        self._sums, self._seconds = None, 0.0
