"""A number that was logged over a run."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Point(NamedTuple):
    """One logged number; `time` is in seconds since 1970, NaN where it was not logged."""

    tag: str
    step: int
    value: float
    time: float


@dataclass(frozen=True, eq=False)
class Series:
    """What was logged under one tag.

    Attributes:
        steps: (T,) int64, increasing.
        values: (T,) float64.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def at(self, steps: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the values at these steps, NaN where there is none."""
        places = np.searchsorted(self.steps, steps).clip(max=len(self.steps) - 1)
        return np.where(self.steps[places] == steps, self.values[places], np.nan)


def make_series(points: Iterable[Point]) -> dict[str, Series]:
    """Return the series of each tag; of two points at one step the later one counts."""
    by_tag: dict[str, dict[int, float]] = defaultdict(dict)
    for point in points:
        by_tag[point.tag][point.step] = point.value
    return {tag: _sorted(values) for tag, values in by_tag.items()}


def _sorted(values: dict[int, float]) -> Series:
    steps = np.array(sorted(values), dtype=np.int64)
    return Series(steps, np.array([values[step] for step in steps.tolist()], dtype=np.float64))
