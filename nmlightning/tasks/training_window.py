"""What is logged of training on tokens: means over the steps since it was last logged."""

import math
import time

import torch
from torch import Tensor

from nmlightning.tasks.token_loss import TokenLoss


class TrainingWindow:
    """The steps since the last reading: sums on the device, so that no step waits, and a clock."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # of loss, −log p, target tokens, tokens on both sides
        self._steps = 0
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

    def add(self, step: TokenLoss, tokens: Tensor) -> None:
        """Add a step, and the number of tokens that its sentences have on both sides."""
        sums = torch.stack(
            (step.loss.detach(), step.negative_log_likelihood, step.tokens.float(), tokens.float())
        )
        self._sums = sums if self._sums is None else self._sums + sums
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Return `loss`, `ppl` and `tokens_per_s` of the steps, and begin anew.

        There is one step at least. It waits for the device once.
        """
        assert self._sums is not None, "add comes first"
        loss, negative_log_likelihood, targets, tokens = self._sums.tolist()
        self.pause()
        values = {
            "loss": loss / self._steps,
            "ppl": float(torch.tensor(negative_log_likelihood / targets).exp()),
            "tokens_per_s": tokens / self._seconds if self._seconds else math.nan,
        }
        self._sums, self._steps, self._seconds = None, 0, 0.0
        self.resume()
        return values
