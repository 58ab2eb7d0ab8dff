"""Which sentence pairs make each batch: those of about one length, up to a number of tokens."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DIFFERENCE_STEP = 2  # tokens: of pairs whose sides differ alike, any order is as good

Lengths = NDArray[np.int64]


class BatchPlan:
    """Cuts sentence pairs into batches of N pairs with N · (longest side) <= tokens.

    Pairs are sorted by their longer side L = max(S, T), then by the difference of their sides, up
    and down in turn, and in any order among equals. Where a batch ends follows from the sequence of
    L alone, which is the same in every order: so all epochs have the same number of batches.

    Attributes:
        cells: (P,) float64 whole numbers: what the pairs are sorted by.
        bounds: (batches + 1,): batch i holds the pairs bounds[i] … bounds[i + 1] − 1 of the order.
    """

    cells: Tensor
    bounds: list[int]

    def __init__(self, cells: Tensor, bounds: list[int]) -> None:
        self.cells = cells
        self.bounds = bounds

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def draw(self, generator: torch.Generator) -> list[Tensor]:
        """Return the rows of each batch: equals in a random order, and so the batches."""
        noise = torch.rand(len(self.cells), generator=generator, dtype=torch.float64)
        order = torch.argsort(self.cells + noise, stable=True)
        batches = order.tensor_split(self.bounds[1:-1])
        return [batches[index] for index in torch.randperm(len(self), generator=generator)]


def plan_batches(source: Lengths, target: Lengths, tokens: int) -> BatchPlan:
    """Return how pairs of the padded lengths S and T, each (P,), are cut into batches.

    A pair whose longer side is over `tokens` is a batch of its own.
    """
    longest = np.maximum(source, target)
    difference = (target - source) // DIFFERENCE_STEP
    turning = np.where(longest % 2, difference, -difference)
    span = 2 * int(np.abs(difference).max(initial=0)) + 1
    cells = torch.from_numpy((longest * span + turning).astype(np.float64))
    bounds = cut_sorted(np.sort(longest), tokens)
    return BatchPlan(cells, bounds)


def cut_sorted(lengths: Lengths, tokens: int) -> list[int]:
    """Return 0 and where each batch ends, for ascending lengths: N · (its last) <= tokens."""
    bounds = [0]
    while bounds[-1] < len(lengths):
        start = bounds[-1]
        bounds.append(start + max(1, _fitting(lengths[start:], tokens)))
    return bounds


def _fitting(lengths: Lengths, tokens: int) -> int:
    """Return how many of the first make a batch."""
    few = lengths[: tokens // max(1, int(lengths[0]))]  # no more can fit
    sizes = np.arange(1, len(few) + 1) * few
    return int(np.searchsorted(sizes, tokens, side="right"))
