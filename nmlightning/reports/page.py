"""A comparison of runs as one page of HTML, whose charts need no network."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nmlightning.reports import tags
from nmlightning.reports.comparison import SETTING_HEADINGS, Group, result_columns, setting_rows
from nmlightning.reports.formatting import is_share
from nmlightning.reports.run import Run

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

GENERATOR = '<meta name="generator" content="nmlightning">'
# Okabe and Ito's colours, which colour-blind people tell apart, without the yellow.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B6B6B")
_MOST_LAYERS = 12
_MOST_POINTS = 2000
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --quiet: #6b7280; --rule: #e5e7eb; --page: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --quiet: #9ca3af; --rule: #374151; --page: #15181c }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 1440px; margin: 2rem auto; padding: 0 1.5rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin: 2rem 0 0 }
p { color: var(--quiet); margin: 0 0 .75rem }
.table { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .35rem 1.25rem .35rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; white-space: nowrap }
.key { display: inline-block; width: 1rem; height: .25rem; margin-right: .5rem;
  vertical-align: middle }
.charts { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)) }
"""
# Greys that can be read on a white page and on a dark one.
_LAYOUT: dict[str, Any] = {
    "template": "none",
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"color": "#838a96", "size": 11},
    "hoverlabel": {"bgcolor": "#fff", "font": {"color": "#1c2024"}, "namelength": -1},
    "hovermode": "x unified",
    "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#838a96", "activecolor": _COLOURS[0]},
    "margin": {"l": 58, "r": 12, "t": 36, "b": 40},
    "showlegend": False,
    "title": {"x": 0, "xref": "paper", "font": {"size": 13}},
    "xaxis": {"gridcolor": "rgba(128,128,128,.25)", "zeroline": False},
    "yaxis": {"gridcolor": "rgba(128,128,128,.25)", "zeroline": False, "nticks": 5},
}
_CONFIG = {
    "displaylogo": False,
    "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    "responsive": True,
}

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def write_page(groups: Sequence[Group]) -> str:
    """Return the page: the table, the curves of the metric, the norms and the factors."""
    from plotly.offline import get_plotlyjs

    count = sum(len(group.runs) for group in groups)
    title = f"Comparison of {count} run{'s' * (count > 1)}"
    alone = all(len(group.runs) == 1 for group in groups)
    several = "" if alone else "Faint: each run. Strong: their mean."
    means, first_runs = "the mean over the channels of a layer", "Of the first run of each setting."
    steering = f"What steering multiplied steps by: {means}. {first_runs}"
    sections = [
        _section("Metric", several, [_plot_metric(groups)]),
        _section("Norms of weights", f"{means}. {first_runs}", _plot_layers(groups, _norms)),
        _section("Correction factors", steering, _plot_layers(groups, _factors)),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{GENERATOR}'
        f'<meta name="viewport" content="width=device-width"><title>{title}</title>'
        f"<style>{_STYLE}</style><script>{get_plotlyjs()}</script></head>"
        f"<body><h1>{title}</h1>{_table(groups)}{''.join(sections)}</body></html>\n"
    )


def _table(groups: Sequence[Group]) -> str:
    *results_of, time = columns = result_columns(groups)
    headings = [*SETTING_HEADINGS, *(f"{groups[0].metric}, {h}" for h in results_of), time]
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    rows = []
    cells_of = zip(setting_rows(groups), *columns.values(), strict=True)
    for number, (settings, *results) in enumerate(cells_of):
        key = f'<span class="key" style="background:{_colour(number)}"></span>'
        texts = [escape(cell).replace("\n", "<br/>") for cell in (*settings, *results)]
        cells = "</td><td>".join(texts)
        rows.append(f"<tr><td>{key}{cells}</td></tr>")
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="table"><table>{body}</table></div>'


def _section(title: str, note: str, figures: Sequence["Figure"]) -> str:
    """Return a heading and the charts below it, or nothing where there are none."""
    charts = "".join(
        figure.to_html(
            config=_CONFIG,
            div_id=f"{title}-{number}".replace(" ", "-"),
            full_html=False,
            include_plotlyjs=False,
        )
        for number, figure in enumerate(figures)
    )
    heading = f"<h2>{title}</h2><p>{note[:1].upper()}{note[1:]}</p>"
    layout = "charts" if len(figures) > 1 else "chart"
    return f'{heading}<div class="{layout}">{charts}</div>' if charts else ""


def _plot_metric(groups: Sequence[Group]) -> "Figure":
    """Return the curve of each run, and of several runs of a setting their mean."""
    scale, unit = (100.0, ", %") if is_share(groups[0].metric) else (1.0, "")
    faint: list[dict[str, Any]] = []
    strong: list[dict[str, Any]] = []
    for number, group in enumerate(groups):
        curves = [
            (run.epochs_at(curve.steps), scale * curve.values)
            for run, curve in zip(group.runs, group.curves, strict=True)
        ]
        several = len(curves) > 1
        for run, curve in zip(group.runs, curves, strict=True):
            line = _line(f"{group.name}, {run.folder}", number, curve, faint=several)
            (faint if several else strong).append(line)
        if several:
            strong.append(_line(f"{group.name}, mean", number, _mean_curve(curves)))
    return _plot([*faint, *strong], groups[0].metric + unit, "epoch", height=400)


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean of the curves where all of them have a value."""
    shared = curves[0][0]
    for x, _ in curves[1:]:
        shared = np.intersect1d(shared, x)
    return shared, np.mean([y[np.searchsorted(x, shared)] for x, y in curves], axis=0)


def _plot_layers(
    groups: Sequence[Group], curves_of: Callable[[Run], Mapping[str, Curve]]
) -> list["Figure"]:
    """Return a chart for each layer, or for a dozen of them spread over the depth."""
    by_group = [curves_of(group.runs[0]) for group in groups]
    layers = list(dict.fromkeys(layer for curves in by_group for layer in curves))
    return [
        _plot(
            [
                _line(group.name, number, curves[layer])
                for number, (group, curves) in enumerate(zip(groups, by_group, strict=True))
                if layer in curves
            ],
            layer,
            "step",
            height=280,
            logarithmic=True,
        )
        for layer in [layers[place] for place in _spread_out(len(layers), _MOST_LAYERS)]
    ]


def _plot(
    lines: Sequence[Mapping[str, Any]],
    title: str,
    x_label: str,
    *,
    height: int,
    logarithmic: bool = False,
) -> "Figure":
    from plotly.graph_objects import Figure

    figure = Figure(lines, _LAYOUT)
    figure.update_layout(height=height, title_text=escape(title), xaxis_title_text=x_label)
    return figure.update_yaxes(type="log" if logarithmic else "linear")


def _line(name: str, number: int, curve: Curve, *, faint: bool = False) -> dict[str, Any]:
    """Return a line for plotly; a faint one is one of several that another line sums up."""
    kept = _spread_out(len(curve[0]), _MOST_POINTS)
    x, y = (values[kept] for values in curve)
    return {
        "name": escape(name),
        "x": x,
        "y": y,
        "mode": "lines" if len(x) > 1 else "markers",
        "line": {"color": _colour(number), "width": 1 if faint else 2},
        "opacity": 0.4 if faint else 1,
    }


def _spread_out(length: int, most: int) -> NDArray[np.int64]:
    """Return at most so many indices of a sequence, the first and the last among them."""
    return np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(np.int64))


def _norms(run: Run) -> dict[str, Curve]:
    if run.norms is None:
        return {}
    steps = run.norms.steps.astype(np.float64)
    return {
        tags.layer_of(name): (steps, values.mean(axis=1).astype(np.float64))
        for name, values in run.norms.norms.items()
    }


def _factors(run: Run) -> dict[str, Curve]:
    begin, end = tags.factor_tag("\n", "mean").split("\n")
    return {
        tag.removeprefix(begin).removesuffix(end): (series.steps.astype(np.float64), series.values)
        for tag, series in run.scalars.items()
        if tag.startswith(begin) and tag.endswith(end)
    }


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]
