"""How far a number scatters over runs."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of one number over runs.

    Attributes:
        mean: of all n.
        deviation: with the divisor n − 1; NaN for a single one.
    """

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return that of one or more values."""
        several = len(values) > 1
        return cls(statistics.fmean(values), statistics.stdev(values) if several else float("nan"))
