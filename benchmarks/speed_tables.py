"""Writes measurements as a table for a terminal, as Markdown and as JSON."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from interleaved import Quartiles
from rich import box
from rich.table import Table
from sampled import Figure
from targets import Measurement, Result, Skipped, average, judge
from zoo_tables import replace_between

COLUMNS = ("", "what", "one thread, CPU", "all threads, wall", "target", "", "rounds", "faults")
DECIMALS = {"×": 2, "%": 2, "images/s": 0}
COLOURS = {"met": "green", "missed": "red", "not decided": "yellow"}


def format_figure(value: float, unit: str) -> str:
    """Return a figure with its unit, ratios plainly, and a dash for none."""
    if value != value:
        return "–"
    return f"{value:,.{DECIMALS[unit]}f}" + ("" if unit == "×" else f" {unit}")


def format_spread(spread: Quartiles, unit: str) -> str:
    """Return the median and, in brackets, the other quartiles."""
    middle = format_figure(spread.median, unit)
    low, high = (format_figure(v, "×" if unit == "%" else unit) for v in (spread.low, spread.high))
    return middle if spread.low == spread.high or middle == "–" else f"{middle} ({low} to {high})"


def format_row(row: Measurement) -> str:
    """Return one case, as it is printed when it was measured."""
    figures = " | ".join(format_spread(spread, row.unit) for spread in row.spreads)
    backend = f", {row.backend}" if row.backend else ""
    kept, faults = describe_rounds([row])
    kept = f"; rounds {kept}; faults {faults}" if kept else ""
    return f"{row.target:4}{row.what}, {row.case}{backend}: {figures}{kept}"


def describe_rounds(rows: Sequence[Measurement]) -> tuple[str, str]:
    """Return how many rounds were kept, with one thread and with all, and the page faults.

    The rounds are of the worst case, the faults of a call of ours and its rival, on average.
    """
    figures = [row.quartiles for row in rows if isinstance(row.quartiles, Figure)]
    if not figures:
        return "", ""
    worst = [min((f.kept[i], -f.tried[i]) for f in figures) for i in (0, 1)]
    faults = [sum(f.faults[i] for f in figures) / len(figures) for i in (0, 1)]
    rounds = ", ".join(f"{kept} of {-tried}" for kept, tried in worst)
    return rounds, " / ".join(f"{mean:,.0f}" for mean in faults)


def summarise(rows: Sequence[Measurement]) -> tuple[str, ...]:
    """Return the cases of one comparison as one line: the geometric mean, and the worst case."""
    first = rows[0]
    cases = first.case if len(rows) == 1 else f"{len(rows)} cases"
    worst = min if first.bound is not None and first.bound.is_least else max
    figures = []
    for number, spread in enumerate(average(rows)):
        text = format_spread(spread, first.unit)
        if len(rows) > 1:
            one = worst(row.spreads[number].median for row in rows)
            text += f", worst {format_figure(one, first.unit)}"
        figures.append(text)
    bound = "" if first.bound is None else str(first.bound)
    return (
        first.target,
        f"{first.what} ({cases}{', formula' * (first.backend == 'formula')})",
        *(["", *figures] if len(figures) == 1 else figures),
        f"{bound} %" if bound and first.unit == "%" else bound,
        judge(rows),
        *describe_rounds(rows),
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
    for why, names in skipped.items():
        what = f"{', '.join(names)}: {why}"
        table.append((names[0], what, "", "", "", "not measured", "", ""))
    return sorted(table, key=lambda line: _place(line[0]))


def _place(target: str) -> tuple[int, int]:
    return "NCH".index(target[0]), int(target[1:])


def make_table(results: Sequence[Result]) -> Table:
    """Return the summary for a terminal, which 80 columns are enough for."""
    head = [name.replace(", ", "\n") for name in COLUMNS[:5]]
    table = Table(*head, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for target, what, *cells, verdict, rounds, faults in summarise_all(results):
        more = f"\n[dim]rounds {rounds}; faults {faults}[/]" if rounds else ""
        *figures, bound = (re.sub(r"\),? ?| \(|, ", "\n", cell).strip() for cell in cells)
        colour = COLOURS.get(verdict, "default")
        table.add_row(target, what + more, *figures, f"{bound}\n[{colour}]{verdict}[/]".strip())
    return table


def make_markdown(results: Sequence[Result], header: Iterable[str], earlier: str = "") -> str:
    """Return the summary under what it was measured with.

    The lines of an earlier one stay where they are of other targets, and with them its header.
    """
    head = list(COLUMNS)
    head[5] = "verdict"
    title, rule, *lines = (
        f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"
        for row in (head, ["---"] * len(head), *summarise_all(results))
    )
    measured = {row.target for row in results}
    old = re.findall(r"^\| [NCH]\d.*", earlier, re.M)
    if kept := [line for line in old if line.split()[1] not in measured]:
        header = dict.fromkeys([*re.findall("^    (.*)", earlier, re.M), *header])
    lines = sorted([*kept, *lines], key=lambda line: _place(line.split()[1]))
    return "\n".join([*(f"    {line}" for line in header), "", title, rule, *lines])


def write_results(file: Path, results: Sequence[Result], header: Sequence[str]) -> None:
    """Write the summary into a page, where the lines of targets that were not measured stay."""
    earlier = file.read_text("utf-8") if file.exists() else ""
    earlier = earlier.rpartition("<!-- speed: begin -->")[2].partition("<!-- speed: end -->")[0]
    write_markdown(file, "speed", make_markdown(results, header, earlier))


def write_markdown(file: Path, name: str, text: str) -> None:
    """Write a text into a page, between the markers of this name, or into a file of its own."""
    if file.exists() and f"<!-- {name}: begin -->" in file.read_text("utf-8"):
        replace_between(file, name, text)
    else:
        file.write_text(f"{text}\n", encoding="utf-8")


def make_json(results: Sequence[Result], header: Sequence[str]) -> dict[str, object]:
    """Return every case as plain data."""
    return {
        "header": list(header),
        "measured": [_plain(r) for r in results if isinstance(r, Measurement)],
        "skipped": [asdict(r) for r in results if isinstance(r, Skipped)],
    }


def _plain(row: Measurement) -> dict[str, object]:
    figure = row.quartiles
    names = ("one_thread", "all_threads") if isinstance(figure, Figure) else ("all_threads",)
    spreads = {n: q._asdict() for n, q in zip(names, row.spreads, strict=True)}
    more = {n: getattr(figure, n, None) for n in ("kept", "tried", "faults")}
    return {**asdict(row), "quartiles": spreads, **more, "verdict": judge([row])}
