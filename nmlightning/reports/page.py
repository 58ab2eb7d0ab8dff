"""A comparison of runs as one page of HTML, whose charts need no network."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from nmlightning.reports import tags
from nmlightning.reports.comparison import (
    SETTING_HEADINGS,
    Group,
    is_loss,
    result_columns,
    setting_rows,
)
from nmlightning.reports.formatting import is_share
from nmlightning.reports.run import CONFIGS, Run

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

GENERATOR = '<meta name="generator" content="nmlightning">'
# Okabe and Ito's colours, which colour-blind people tell apart, without the yellow.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B6B6B")
_MOST_LAYERS = 12
_MOST_POINTS = 2000
_EPOCHS_TICKED = 10  # each of them; of more plotly chooses some
_STAGE = re.compile(r"(?<![a-z])(train(ing)?|val(id(ation)?)?)(?![a-z])[/_]?", re.IGNORECASE)
# Of the first lines in these colours, the next and the last: in a chart, and in CSS.
_DASHES = (("solid", "solid"), ("dash", "dashed"), ("dot", "dotted"))
_KEPT = {"curves": "csv", "settings": "json"}
_MOST_LINES_HOVERED = 8
_MOST_SETTINGS = 6  # that are shown before a click
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --quiet: #6b7280; --rule: #e5e7eb; --page: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --quiet: #9ca3af; --rule: #374151; --page: #15181c }
}
html { overflow-y: scroll }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  margin: 1.5rem clamp(.75rem, 2vw, 2rem); overflow-wrap: break-word }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin: 2rem 0 0 } a { color: inherit }
p { color: var(--quiet); margin: 0 0 .75rem }
.table { overflow: auto; max-height: 75vh }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .35rem 1.25rem .35rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; white-space: nowrap }
th { position: sticky; top: 0; background: var(--page) }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0 }
[aria-sort=ascending] button::after { content: " ↑" }
[aria-sort=descending] button::after { content: " ↓" }
.key { display: inline-block; width: 1.25rem; height: 0; margin-right: .5rem;
  vertical-align: middle }
.charts { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)) }
.js-plotly-plot text:not(.hoverlayer text) { fill: var(--ink) !important }
"""
_SORT = """
document.querySelectorAll("th button").forEach((button, column) => button.onclick = () => {
  const head = button.parentNode, body = head.closest("table").tBodies[0];
  const key = ({cells}) => cells[column].dataset.sort ?? cells[column].textContent;
  const number = text => parseFloat(text.replace(/,/g, ""));
  const compare = (x, y) => number(x) - number(y) || x.localeCompare(y, "en", {numeric: true});
  const rows = [...body.rows].sort((a, b) => compare(key(a), key(b)));
  const order = head.ariaSort === "ascending" ? "descending" : "ascending";
  for (const other of head.parentNode.cells) other.ariaSort = null;
  head.ariaSort = order;
  body.append(...order === "ascending" ? rows : rows.reverse());
});
"""
# Greys that can be read on a white page and on a dark one.
_AXIS = {"gridcolor": "rgba(128,128,128,.25)", "zeroline": False}
_LAYOUT: dict[str, Any] = {
    "template": "none",
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"color": "#838a96", "size": 11},
    "hoverlabel": {"bgcolor": "#fff", "font": {"color": "#1c2024"}, "namelength": -1},
    "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#838a96", "activecolor": _COLOURS[0]},
    "margin": {"l": 62, "r": 12, "t": 36, "b": 40},
    "showlegend": False,
    "title": {"x": 0, "xref": "paper", "font": {"size": 13}},
    "xaxis": {**_AXIS, "nticks": 8},
    "yaxis": {**_AXIS, "nticks": 5, "hoverformat": ".4g"},
}
_CONFIG = {
    "displaylogo": False,
    "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    "responsive": True,
}

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def write_page(groups: Sequence[Group], place: Path) -> str:
    """Return the page: the table, the curves of training and validation, norms and factors.

    Args:
        groups: the runs, by setting.
        place: the folder that the page is for, from which it links to the runs.
    """
    from plotly.offline import get_plotlyjs

    count = sum(len(group.runs) for group in groups)
    title = f"Comparison of {count} run{'s' * (count > 1)}"
    alone = all(len(group.runs) == 1 for group in groups)
    several = "" if alone else "Faint: each run. Strong: their mean."
    means, first_runs = "the mean over the channels of a layer", "Of the first run of each setting."
    steering = f"What steering multiplied steps by: {means}. {first_runs}"
    curves = [_plot_metric(groups, tag) for tag in _choose_curves(groups)]
    sections = [
        _section("Curves", several, curves),
        _section(
            "Norms of weights", f"{means}. {first_runs}", _plot_layers(groups, _norms, "norm")
        ),
        *(
            _section(title, first_runs, _plot_layers(groups, partial(_quantity, name), name))
            for name, title in tags.QUANTITIES.items()
        ),
        _section("Correction factors", steering, _plot_layers(groups, _factors, "factor")),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{GENERATOR}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style><script>{get_plotlyjs()}</script></head>"
        f"<body><h1>{title}</h1>{_table(groups, place)}{''.join(sections)}"
        f"<script>{_SORT}</script></body></html>\n"
    )


def _table(groups: Sequence[Group], place: Path) -> str:
    *results_of, time = columns = result_columns(groups)
    headings = [*SETTING_HEADINGS, *(f"{groups[0].metric}, {h}" for h in results_of), time, "files"]
    head = "".join(f'<th><button type="button">{escape(h)}</button></th>' for h in headings)
    rows = []
    cells_of = zip(groups, setting_rows(groups), *columns.values(), strict=True)
    for number, (group, (name, *settings), *results, duration) in enumerate(cells_of):
        colour, _, dash = _pen(number)
        key = f'<span class="key" style="border-top: 4px {dash} {colour}"></span>'
        texts = [escape(cell).replace("\n", "<br/>") for cell in (name, *settings, *results)]
        if (count := settings[-1].count("\n") + 1) > _MOST_SETTINGS:
            summary = f"<details><summary>{count} settings</summary>"
            texts[len(settings)] = f"{summary}{texts[len(settings)]}</details>"
        cells = "</td><td>".join(texts)
        links = "<br/>".join(_links(part, place) for run in group.runs for part in run.parts)
        seconds = f'<td data-sort="{group.seconds.mean}">{duration}</td>'
        rows.append(f"<tr><td>{key}{cells}</td>{seconds}<td>{links}</td></tr>")
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="table" tabindex="0"><table>{body}</table></div>'


def _links(folder: Path, place: Path) -> str:
    """Return links to the folder of a run and to its config, or to the two files kept of it."""
    if folder.is_dir():
        config = next(filter(Path.is_file, map(folder.joinpath, CONFIGS)), None)
        files = {folder.name: folder} | ({"config": config} if config else {})
    else:
        files = {x: folder.with_name(f"{folder.name}.{y}") for x, y in _KEPT.items()}
    return " ".join(
        f'<a href="{quote(os.fsencode(os.path.relpath(file, place)))}">{escape(name)}</a>'
        for name, file in files.items()
    )


def _section(title: str, note: str, figures: Sequence["Figure"]) -> str:
    """Return a heading and the charts below it, or nothing where there are none."""
    name, plain = title.replace(" ", "-"), {"full_html": False, "include_plotlyjs": False}
    charts = "".join(
        figure.to_html(_CONFIG, div_id=f"{name}-{number}", **plain)
        for number, figure in enumerate(figures)
    )
    heading = f"<h2>{title}</h2><p>{note[:1].upper()}{note[1:]}</p>"
    layout = "charts" if len(figures) > 1 else "chart"
    return f'{heading}<div class="{layout}">{charts}</div>' if charts else ""


def _choose_curves(groups: Sequence[Group]) -> list[str]:
    """Return the metric and what else was logged of its kind, training beside validation."""
    runs = [run for group in groups for run in group.runs]
    logged = dict.fromkeys(tag for run in runs for tag in run.scalars)
    metric = groups[0].metric
    tags = [t for t in logged if _STAGE.search(t) and (is_share(t) or is_loss(t) or "bleu" in t)]
    quantity = {tag: _STAGE.sub("", tag) for tag in [metric, *tags]}
    order = [quantity[metric], *sorted({*quantity.values()} - {quantity[metric]})]
    return sorted(quantity, key=lambda tag: (order.index(quantity[tag]), "val" not in tag.lower()))


def _plot_metric(groups: Sequence[Group], metric: str) -> "Figure":
    """Return the curve of each run that has one, and of several runs of a setting their mean.

    Over epochs, counted from 1, or over steps where several values are of one epoch.
    """
    scale, unit = (100.0, ", %") if is_share(metric) else (1.0, "")
    lines: list[dict[str, Any]] = []
    having = [[run for run in group.runs if metric in run.scalars] for group in groups]
    steps = {run: run.scalars[metric].steps for runs in having for run in runs}
    x_of = {run: run.epochs_at(each) for run, each in steps.items()}  # the steps if not known
    by_epoch = not metric.endswith("_step") and all(
        (np.diff(x) > 0).all() and not np.array_equal(x, steps[run]) for run, x in x_of.items()
    )
    if not by_epoch:
        x_of = {run: each.astype(np.float64) for run, each in steps.items()}
    for number, (group, runs) in enumerate(zip(groups, having, strict=True)):
        curves = [(x_of[run], scale * run.scalars[metric].values) for run in runs]
        several = len(curves) > 1
        for run, curve in zip(runs, curves, strict=True):
            line_name = f"{group.name}, {run.folder.name}" if several else group.name
            lines.append(_line(line_name, number, curve, faint=several))
        if several:
            lines.append(_line(f"{group.name}, mean", number, _mean_curve(curves)))
    lines.sort(key=lambda line: float(line["opacity"]))  # the faint ones behind
    figure = _plot(lines, metric + unit, "epoch" if by_epoch else "step", height=320)
    if by_epoch and max(x.max(initial=0) for x in x_of.values()) <= _EPOCHS_TICKED:
        figure.update_xaxes(dtick=1, minallowed=0.5)
    return figure


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean of the curves where all of them have a value."""
    shared = curves[0][0]
    for x, _ in curves[1:]:
        shared = np.intersect1d(shared, x)
    return shared, np.mean([y[np.searchsorted(x, shared)] for x, y in curves], axis=0)


def _plot_layers(
    groups: Sequence[Group], curves_of: Callable[[Run], Mapping[str, Curve]], quantity: str
) -> list["Figure"]:
    """Return a chart for each layer, or for a dozen of them spread over the depth."""
    by_group = [curves_of(group.runs[0]) for group in groups]
    layers = list(dict.fromkeys(layer for curves in by_group for layer in curves))
    figures = []
    for layer in [layers[place] for place in _spread_out(len(layers), _MOST_LAYERS)]:
        lines = [
            _line(group.name, number, curves[layer])
            for number, (group, curves) in enumerate(zip(groups, by_group, strict=True))
            if layer in curves
        ]
        figure = _plot(lines, layer, "step", height=280)
        is_log = quantity != tags.COSINE
        title = f"{quantity.replace('_', ' ')}{', log scale' if is_log else ''}"
        figures.append(figure.update_yaxes(type="log" if is_log else "linear", title_text=title))
    return figures


def _plot(lines: Sequence[Mapping[str, Any]], title: str, x_label: str, height: int) -> "Figure":
    from plotly.graph_objects import Figure

    figure = Figure(lines, _LAYOUT)
    hover = "x unified" if len(lines) <= _MOST_LINES_HOVERED else "closest"
    figure.update_layout(height=height, title_text=escape(title), hovermode=hover)
    return figure.update_xaxes(title_text=x_label)


def _line(name: str, number: int, curve: Curve, *, faint: bool = False) -> dict[str, Any]:
    """Return a line for plotly; a faint one is one of several that another line sums up."""
    kept = _spread_out(len(curve[0]), _MOST_POINTS)
    x, y = (values[kept] for values in curve)
    colour, dash, _ = _pen(number)
    return {
        "name": escape(name),
        "x": x,
        "y": y,
        "mode": "lines" if len(x) > 1 else "markers",
        "line": {"color": colour, "width": 1 if faint else 2, "dash": dash},
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


def _quantity(name: str, run: Run) -> dict[str, Curve]:
    known = {} if run.norms is None else run.norms.quantities
    if run.norms is None or name not in known:
        return {}
    curves = {}
    for layer, values in zip(map(tags.layer_of, run.norms.norms), known[name].T, strict=True):
        measured = np.isfinite(values)
        if measured.any():
            steps = run.norms.steps[measured].astype(np.float64)
            curves[layer] = steps, values[measured].astype(np.float64)
    return curves


def _factors(run: Run) -> dict[str, Curve]:
    begin, end = tags.factor_tag("\n", "mean").split("\n")
    return {
        tag.removeprefix(begin).removesuffix(end): (series.steps.astype(np.float64), series.values)
        for tag, series in run.scalars.items()
        if tag.startswith(begin) and tag.endswith(end)
    }


def _pen(number: int) -> tuple[str, str, str]:
    """Return a colour and a dash for plotly, and the dash for CSS."""
    return _COLOURS[number % len(_COLOURS)], *_DASHES[number // len(_COLOURS) % len(_DASHES)]
