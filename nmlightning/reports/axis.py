"""One axis of a chart: its ends, its scale, and the numbers at it."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Axis:
    """Where values are between two ends, and at which of them a number stands."""

    low: float
    high: float
    logarithmic: bool

    @classmethod
    def over(cls, values: NDArray[np.float64], *, logarithmic: bool = False) -> "Axis":
        """Return an axis that holds all finite values; only positive ones if it is logarithmic."""
        shown = values[np.isfinite(values) & ((values > 0) | (not logarithmic))]
        low, high = (float(shown.min()), float(shown.max())) if len(shown) else (0.0, 1.0)
        if logarithmic and not len(shown):
            low, high = 1.0, 10.0
        if low == high:
            low, high = (low / 2, high * 2) if logarithmic else (low - 0.5, high + 0.5)
        return cls(low, high, logarithmic)

    def shares(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return 0 for the low end and 1 for the high one; NaN for what has no place."""
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.logarithmic:
                span = math.log(self.high) - math.log(self.low)
                shares = (np.log(values) - math.log(self.low)) / span
            else:
                shares = (values - self.low) / (self.high - self.low)
        return np.where(np.isfinite(shares), shares, np.nan)

    def ticks(self) -> list[float]:
        """Return two to seven round numbers on the axis."""
        return (self._log_ticks() if self.logarithmic else None) or self._linear_ticks()

    def _log_ticks(self) -> list[float] | None:
        """Return powers of ten, with others between where they are few; None if all are few."""
        first, last = math.floor(math.log10(self.low)), math.floor(math.log10(self.high))
        for steps in ([1], [1, 3], [1, 2, 5]):
            ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
            within = [tick for tick in ticks if self.low <= tick <= self.high]
            if len(within) >= 3:
                return within[:: -(-len(within) // 6)]
        return None

    def _linear_ticks(self) -> list[float]:
        rough = (self.high - self.low) / 5
        scale = 10.0 ** math.floor(math.log10(rough))
        stride = next(scale * m for m in (1, 2, 2.5, 5, 10) if scale * m >= rough)
        first = math.ceil(self.low / stride - 1e-9)
        last = math.floor(self.high / stride + 1e-9)
        return [round(count * stride, 12) for count in range(first, last + 1)]
