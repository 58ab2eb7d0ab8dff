"""A comparison of runs as one page of HTML that needs nothing else."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from nmlightning.reports import tags
from nmlightning.reports.comparison import Group
from nmlightning.reports.line_chart import COLOURS, Line, draw_lines
from nmlightning.reports.run import Run
from nmlightning.reports.table import SETTING_HEADINGS, result_columns, setting_rows
from nmlightning.reports.words import is_share

GENERATOR = '<meta name="generator" content="nmlightning">'
_MOST_LAYERS = 12
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --quiet: #6b7280; --rule: #e5e7eb; --page: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --quiet: #9ca3af; --rule: #374151; --page: #15181c }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 1440px; margin: 2rem auto; padding: 0 1.5rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin: 2rem 0 0 }
p { color: var(--quiet); margin: 0 0 .75rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .35rem 1.25rem .35rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; white-space: nowrap }
.key { display: inline-block; width: 1rem; height: .25rem; margin-right: .5rem;
  vertical-align: middle }
.charts { display: flex; flex-wrap: wrap; gap: 1rem }
svg { max-width: 100%; height: auto } svg text { font-size: 11px; fill: var(--quiet) }
svg text.title { font-size: 13px; fill: var(--ink) } svg line { stroke: var(--rule) }
svg path { fill: none; stroke-width: 1.8; stroke-linejoin: round }
svg path.faint { stroke-width: 1; opacity: .4 }
"""

LinesOf = Callable[[Run], Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]]


def write_page(groups: Sequence[Group]) -> str:
    """Return the page: the table, the curves of the metric, the norms and the factors."""
    count = sum(len(group.runs) for group in groups)
    title = f"Comparison of {count} run{'s' * (count > 1)}"
    alone = all(len(group.runs) == 1 for group in groups)
    several = "" if alone else "Faint: each run. Strong: their mean."
    first_runs = "Of the first run of each setting."
    sections = [
        _section("Metric", several, [_draw_metric(groups)]),
        _section(
            "Norms of weights",
            f"The mean over the channels of a layer. {first_runs}",
            list(_draw_layers(groups, _norms)),
        ),
        _section(
            "Correction factors",
            f"What steering multiplied steps by: the mean over the channels of a layer. "
            f"{first_runs}",
            list(_draw_layers(groups, _factors)),
        ),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{GENERATOR}'
        f'<meta name="viewport" content="width=device-width"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>"
        f"{_table(groups)}{''.join(sections)}</body></html>\n"
    )


def _table(groups: Sequence[Group]) -> str:
    *results_of, time = columns = result_columns(groups)
    headings = [*SETTING_HEADINGS, *(f"{groups[0].metric}, {h}" for h in results_of), time]
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    rows = []
    cells_of = zip(setting_rows(groups), *columns.values(), strict=True)
    for number, (settings, *results) in enumerate(cells_of):
        key = f'<span class="key" style="background:{_colour(number)}"></span>'
        cells = "</td><td>".join(
            escape(cell).replace("\n", "<br>") for cell in (*settings, *results)
        )
        rows.append(f"<tr><td>{key}{cells}</td></tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _section(title: str, note: str, charts: Sequence[str]) -> str:
    if not charts:
        return ""
    return f'<h2>{title}</h2><p>{note}</p><div class="charts">{"".join(charts)}</div>'


def _draw_metric(groups: Sequence[Group]) -> str:
    scale, unit = (100.0, ", %") if is_share(groups[0].metric) else (1.0, "")
    lines = []
    for number, group in enumerate(groups):
        curves = [
            (run.epochs_at(c.steps), scale * c.values)
            for run, c in zip(group.runs, group.curves, strict=True)
        ]
        several = len(curves) > 1
        lines += [
            Line(f"{group.name}, {run.folder}", _colour(number), x, y, faint=several)
            for run, (x, y) in zip(group.runs, curves, strict=True)
        ]
        if several:
            shared, mean = _mean_curve(curves)
            lines.append(Line(f"{group.name}, mean", _colour(number), shared, mean))
    lines.sort(key=lambda line: not line.faint)
    return draw_lines(lines, groups[0].metric + unit, "epoch", size=(940, 380))


def _mean_curve(
    curves: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean of the curves where all of them have a value."""
    shared = curves[0][0]
    for x, _ in curves[1:]:
        shared = np.intersect1d(shared, x)
    return shared, np.mean([y[np.searchsorted(x, shared)] for x, y in curves], axis=0)


def _draw_layers(groups: Sequence[Group], lines_of: LinesOf) -> Iterator[str]:
    """Yield a chart for each layer, or for a dozen of them spread over the depth."""
    by_group = [lines_of(group.runs[0]) for group in groups]
    layers = list(dict.fromkeys(layer for lines in by_group for layer in lines))
    chosen = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), _MOST_LAYERS)).round())
    for layer in [layers[int(place)] for place in chosen]:
        lines = [
            Line(group.name, _colour(number), *by_group[number][layer])
            for number, group in enumerate(groups)
            if layer in by_group[number]
        ]
        yield draw_lines(lines, layer, "step", logarithmic=True)


def _norms(run: Run) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    if run.norms is None:
        return {}
    steps = run.norms.steps.astype(np.float64)
    return {
        tags.layer_of(name): (steps, values.mean(axis=1).astype(np.float64))
        for name, values in run.norms.norms.items()
    }


def _factors(run: Run) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    begin, end = tags.factor_tag("\n", "mean").split("\n")
    return {
        tag.removeprefix(begin).removesuffix(end): (series.steps.astype(np.float64), series.values)
        for tag, series in run.scalars.items()
        if tag.startswith(begin) and tag.endswith(end)
    }


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
