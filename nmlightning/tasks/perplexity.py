"""Perplexity of a corpus, whatever it is counted in."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class Perplexity(Metric):
    """exp(−Σ log p(target) / units), over all batches and all processes.

    The units are what `update` says: subwords, or words, whose perplexity does not depend on how
    words are split and so compares vocabularies. Sums are kept in float32.

    Example:
        >>> metric = Perplexity()
        >>> metric.update(torch.tensor(6.0), torch.tensor(3))
        >>> metric.compute()
        tensor(7.3891)
    """

    full_state_update = False
    negative_log_likelihood: Tensor
    units: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("negative_log_likelihood", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("units", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, negative_log_likelihood: Tensor, units: Tensor) -> None:
        """Add −Σ log p of a batch, in nats, and the number of its units; both scalars."""
        self.negative_log_likelihood += negative_log_likelihood
        self.units += units

    def compute(self) -> Tensor:
        """Return the perplexity; it is not a number where there were no units."""
        return (self.negative_log_likelihood / self.units).exp()
