"""A comparison of runs as one page of HTML."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from nmlightning.reports import tags
from nmlightning.reports.comparison import LAST_EPOCHS, Group, differing_settings
from nmlightning.reports.formatting import Spread, format_seconds, format_spread, is_share
from nmlightning.reports.run import Run

SETTING_HEADINGS = ["run", "seeds", "epochs", "what differs"]


def setting_rows(groups: Sequence[Group]) -> list[list[str]]:
    """Return for each group its name and its settings; what differs has a line for each one."""
    names = differing_settings(groups)
    return [
        [group.name, group.seeds, group.epochs, "\n".join(_differences(group, names.items()))]
        for group in groups
    ]


def result_columns(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Return how well and how fast each group did: the cells under each heading.

    There is no column of means of the last epochs where no run has so many.
    """
    spreads: dict[str, list[Spread | None]] = {
        "final": [group.final for group in groups],
        "best": [group.best for group in groups],
        f"mean of last {LAST_EPOCHS}": [group.late for group in groups],
    }
    cells = {
        heading: [format_spread(s, g.metric) for s, g in zip(column, groups, strict=True)]
        for heading, column in spreads.items()
        if any(column)
    }
    return {**cells, "time": [format_seconds(group.seconds.mean) for group in groups]}


def _differences(group: Group, names: Iterable[tuple[str, str]]) -> Iterator[str]:
    settings = group.runs[0].settings
    for key, name in names:
        if key in settings:
            yield f"{name}: {settings[key]}"


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


# Okabe and Ito's colours, which colour-blind people tell apart, without the yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B6B6B")
_MOST_POINTS = 400
_LEFT, _TOP, _RIGHT, _BOTTOM = 58, 30, 12, 40  # margins in pixels


@dataclass(frozen=True, eq=False)
class Line:
    """One line.

    Attributes:
        name: what it is, shown when it is pointed at.
        colour: of CSS.
        x: (T,) increasing.
        y: (T,); what is not finite interrupts the line.
        faint: whether it is one of several that another line sums up.
    """

    name: str
    colour: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    faint: bool = False


def draw_lines(
    lines: Sequence[Line],
    title: str,
    x_label: str,
    *,
    logarithmic: bool = False,
    size: tuple[int, int] = (460, 260),
) -> str:
    """Return the SVG of a chart.

    Args:
        lines: drawn in this order.
        title: what the values are.
        x_label: what x is.
        logarithmic: whether the axis of the values is.
        size: width and height in pixels.
    """
    width, height = size
    x_axis = Axis.over(_joined([line.x for line in lines]))
    y_axis = Axis.over(_joined([line.y for line in lines]), logarithmic=logarithmic)

    def place(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        across = _LEFT + x_axis.shares(x) * (width - _LEFT - _RIGHT)
        down = height - _BOTTOM - y_axis.shares(y) * (height - _TOP - _BOTTOM)
        return np.stack([across, down], axis=1)

    body = [
        f'<text class="title" x="{_LEFT}" y="18">{escape(title)}</text>',
        *_draw_grid(x_axis, y_axis, size),
        f'<text x="{(width + _LEFT) / 2:.0f}" y="{height - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>",
        *(_draw_line(line, place(line.x, line.y)) for line in lines),
    ]
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(title)}">{"".join(body)}</svg>'
    )


def _draw_grid(x_axis: Axis, y_axis: Axis, size: tuple[int, int]) -> Iterator[str]:
    width, height = size
    right, bottom = width - _RIGHT, height - _BOTTOM
    for tick in x_axis.ticks():
        x = _LEFT + float(x_axis.shares(np.array([tick]))[0]) * (right - _LEFT)
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{tick:.5g}</text>'
    for tick in y_axis.ticks():
        y = bottom - float(y_axis.shares(np.array([tick]))[0]) * (bottom - _TOP)
        yield f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.3g}</text>'


def _draw_line(line: Line, places: NDArray[np.float64]) -> str:
    kept = np.unique(np.linspace(0, len(places) - 1, min(len(places), _MOST_POINTS)).round())
    whole = places[kept.astype(np.int64)]
    path = []
    command = "M"
    for x, y in whole.tolist():
        if math.isnan(x) or math.isnan(y):
            command = "M"
            continue
        path.append(f"{command}{x:.1f} {y:.1f}")
        command = "L"
    faint = ' class="faint"' if line.faint else ""
    name = f"<title>{escape(line.name)}</title>"
    return f'<path d="{" ".join(path)}" stroke="{line.colour}"{faint}>{name}</path>'


def _joined(parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.concatenate([np.zeros(0), *parts])


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
