"""The lines of the benchmark's table: measurements beside their targets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from interleaved import Quartiles
from sampled import Figure

Unit = Literal["×", "%", "images/s"]
Verdict = Literal["", "met", "missed", "not decided"]


@dataclass(frozen=True)
class Bound:
    """The most that a figure should be, or the least.

    Attributes:
        value: for the geometric mean of the cases.
        is_least: whether it is the least.
        each: the same for each case, if that is wanted.
    """

    value: float
    is_least: bool = False
    each: float | None = None

    def judge(self, spread: Quartiles, value: float | None = None) -> Verdict:
        """Return "met" or "missed" where all rounds but a quarter say so."""
        value = self.value if value is None else value
        low, _, high = (-q for q in reversed(spread)) if self.is_least else spread
        value = -value if self.is_least else value
        return "met" if high <= value else "missed" if low > value else "not decided"

    def __str__(self) -> str:
        sign = "≥" if self.is_least else "≤"
        mean = f"{sign} {self.value:,g}"
        if self.each is None:
            return mean
        return f"each {mean}" if self.each == self.value else f"{mean}, each {sign} {self.each:,g}"


@dataclass(frozen=True)
class Measurement:
    """A figure of one case, and its target.

    Args:
        target: as C1.
        what: what is compared with what.
        case: shape, layout and type, or the network.
        backend: what computed it.
        quartiles: those of the rounds, in `unit`: with one thread and with all, or of wall time.
        bound: the target; None where a row is shown for comparison.
        unit: of the quartiles and the bound.
    """

    target: str
    what: str
    case: str
    backend: str
    quartiles: Quartiles | Figure
    bound: Bound | None = None
    unit: Unit = "×"

    @property
    def spreads(self) -> tuple[Quartiles, ...]:
        """Return the quartiles of CPU time with one thread, where known, and of wall time."""
        figure = self.quartiles
        return (figure.cpu, figure.wall) if isinstance(figure, Figure) else (figure,)


@dataclass(frozen=True)
class Skipped:
    """A target that was not measured, and why."""

    target: str
    why: str


Result = Measurement | Skipped


def average(rows: Sequence[Measurement]) -> tuple[Quartiles, ...]:
    """Return the geometric means of the cases' quartiles, for each number of threads."""
    spreads = zip(*(row.spreads for row in rows), strict=True)
    return tuple(
        Quartiles(*(math.prod(column) ** (1 / len(rows)) for column in zip(*each, strict=True)))
        for each in spreads
    )


def judge(rows: Sequence[Measurement]) -> Verdict:
    """Return the verdict on all cases of a comparison.

    It is met if it is for every number of threads, missed if it is for one of them. The wider
    spread of a mean of cases counts, as if all were high at once.
    """
    bound = rows[0].bound
    if bound is None:
        return ""
    found = {bound.judge(spread) for spread in average(rows)}
    if bound.each is not None:
        found |= {bound.judge(spread, bound.each) for row in rows for spread in row.spreads}
    return next(v for v in ("missed", "not decided", "met") if v in found)
