"""Writes measurements as a table for a terminal, as Markdown and as JSON."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from rich.table import Table
from targets import Measurement, Result, Skipped

COLUMNS = ("", "what", "measured", "spread", "target", "limit", "", "backend")
DECIMALS = {"×": 2, "%": 3, "images/s": 0}
COLOURS = {"met": "green", "mis": "red"}


def format_figure(value: float, unit: str) -> str:
    """Return a figure with its unit, ratios plainly."""
    return f"{value:,.{DECIMALS[unit]}f}" + ("" if unit == "×" else f" {unit}")


def format_row(row: Measurement) -> str:
    """Return one case, as it is printed when it was measured."""
    low, middle, high = (format_figure(value, row.unit) for value in row.quartiles)
    bound = f", target {row.bound}: {row.verdict}" if row.bound else ""
    return f"{row.target:4} {row.what}, {row.case}: {middle} ({low} to {high}){bound}"


def summarise(rows: Sequence[Measurement]) -> tuple[str, ...]:
    """Return the cases of one comparison as one line.

    The figure is the geometric mean of their medians, the spread goes from the lowest first
    quartile to the highest third. A target is met if every case meets it.
    """
    first = rows[0]
    middle = math.exp(sum(math.log(row.quartiles.median) for row in rows) / len(rows))
    low, high = min(row.quartiles.low for row in rows), max(row.quartiles.high for row in rows)
    cases = first.case if len(rows) == 1 else f"{len(rows)} cases"
    bound = "" if first.bound is None else str(first.bound)
    if bound and first.unit != "×":
        bound += f" {first.unit}"
    return (
        first.target,
        f"{first.what} ({cases})",
        format_figure(middle, first.unit),
        f"{format_figure(low, first.unit)} to {format_figure(high, first.unit)}",
        bound,
        first.limit,
        _format_verdict(rows, middle),
        ", ".join(dict.fromkeys(row.backend for row in rows)),
    )


def _format_verdict(rows: Sequence[Measurement], middle: float) -> str:
    bound = rows[0].bound
    if bound is None:
        return ""
    met = sum(row.verdict == "met" for row in rows)
    if met == len(rows):
        return "met"
    count = f" in {met} of {len(rows)}" if met else ""
    return (
        f"met on average,{count}" if bound.is_met(middle) else f"missed{count and ', met'}{count}"
    )


def summarise_all(results: Iterable[Result]) -> list[tuple[str, ...]]:
    """Return a line for each comparison, and for each reason why targets were not measured."""
    lines: dict[tuple[str, str], list[Measurement]] = {}
    skipped: dict[str, list[str]] = {}
    for row in results:
        if isinstance(row, Measurement):
            lines.setdefault((row.target, row.what), []).append(row)
        else:
            skipped.setdefault(row.why, []).append(row.target)
    table = [summarise(rows) for rows in lines.values()]
    table += [(", ".join(n), why, "not measured", *[""] * 5) for why, n in skipped.items()]
    return sorted(table, key=lambda line: _place(line[0]))


def _place(targets: str) -> tuple[str, int]:
    first = targets.split(",")[0]
    return first[0], int(first[1:])


def make_table(results: Sequence[Result]) -> Table:
    """Return the summary for a terminal."""
    table = Table(*COLUMNS)
    for line in summarise_all(results):
        colour = COLOURS.get(line[6][:3], "")
        table.add_row(*line[:6], f"[{colour}]{line[6]}[/]" if colour else line[6], line[7])
    return table


def make_markdown(results: Sequence[Result], header: Sequence[str]) -> str:
    """Return the summary for `docs/speed.md`, under what it was measured with."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *summarise_all(results)]
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join([*(f"    {line}" for line in header), "", *lines, ""])


def make_json(results: Sequence[Result], header: Sequence[str]) -> dict[str, object]:
    """Return every case as plain data."""
    return {
        "header": list(header),
        "measured": [
            {**asdict(r), "quartiles": r.quartiles._asdict(), "verdict": r.verdict}
            for r in results
            if isinstance(r, Measurement)
        ],
        "skipped": [asdict(r) for r in results if isinstance(r, Skipped)],
    }
