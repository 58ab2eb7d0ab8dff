"""A chart of lines as SVG, for a page that is opened without any network."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from nmlightning.reports.axis import Axis

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
