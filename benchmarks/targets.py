"""The lines of the benchmark's table: measurements beside their targets."""

from dataclasses import dataclass
from typing import Literal

from interleaved import Quartiles

Unit = Literal["×", "%", "images/s"]


@dataclass(frozen=True)
class Bound:
    """The most that a figure should be, or the least."""

    value: float
    is_least: bool = False

    def is_met(self, figure: float) -> bool:
        """Return whether the figure keeps the bound."""
        return figure >= self.value if self.is_least else figure <= self.value

    def __str__(self) -> str:
        return f"{'≥' if self.is_least else '≤'} {self.value:,g}"


@dataclass(frozen=True)
class Measurement:
    """A figure, its quartiles over the rounds, and its target.

    Args:
        target: as C1.
        what: what is compared with what.
        case: shape, layout and type, or the network.
        backend: what computed it.
        quartiles: those of the rounds, in `unit`.
        bound: the target; None where a row is shown for comparison.
        limit: what no implementation can pass, as far as it is known.
        unit: of the quartiles and the bound.
    """

    target: str
    what: str
    case: str
    backend: str
    quartiles: Quartiles
    bound: Bound | None = None
    limit: str = ""
    unit: Unit = "×"

    @property
    def verdict(self) -> str:
        """Return "met" or "missed" by the median, and nothing without a bound."""
        if self.bound is None:
            return ""
        return "met" if self.bound.is_met(self.quartiles.median) else "missed"


@dataclass(frozen=True)
class Skipped:
    """A target that was not measured, and why."""

    target: str
    why: str


Result = Measurement | Skipped
