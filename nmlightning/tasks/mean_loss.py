"""The mean loss of all images, whatever the sizes of the batches they came in."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanLoss(Metric):
    """Σ images · loss / Σ images, over all batches and all processes.

    Sums are kept in float32. It is not a number where a loss was none, and where nothing was added.

    Example:
        >>> metric = MeanLoss()
        >>> metric.update(torch.tensor(1.0), 3)
        >>> metric.update(torch.tensor(2.0), 1)
        >>> metric.compute()
        tensor(1.2500)
    """

    full_state_update = False
    total: Tensor
    images: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, loss: Tensor, images: int) -> None:
        """Add the mean loss of a batch, a scalar, and the number of its images."""
        self.total = torch.add(self.total, loss.detach().float(), alpha=images)
        self.images += images

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.images
