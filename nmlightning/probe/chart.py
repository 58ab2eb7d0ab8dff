"""A picture of the inputs of norm layers against what float16 lets each norm take."""

from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from nmlightning.probe.report import LayerRanges
from nmlightning.reports.formatting import format_loss
from nmlightning.reports.page import Axis

GENERATOR = "<!-- generator: nmlightning -->"
_WIDTH, _ROW = 980, 18  # pixels
_TOP, _BOTTOM = 92, 34
_LEFT, _RIGHT = 250, 130
_ENDS = (_WIDTH - 16, _WIDTH - 70)  # of the two columns of losses
_LONGEST_NAME = 36  # characters
_WHOLE = (1e-5, 1e5)  # what the axis shows at least: a little more than float16 can
# Okabe and Ito's colours, which colour-blind people tell apart.
_KEPT, _LOST = "#0072B2", "#D55E00"
_SHADES = ("#eef1f4", "#d3e4ee")
_STYLE = """
svg { background: #fff; font: 12px system-ui, sans-serif; fill: #1c2024 }
.quiet { fill: #6b7280 } .title { font-size: 15px } .grid { stroke: #fff; opacity: .8 }
""".strip()


class Band(NamedTuple):
    """What a norm can take: σ from `low` on, and |x − μ| up to `high`."""

    norm: str
    name: str
    low: float
    high: float


def draw_ranges(layers: Sequence[LayerRanges], wide: Band, narrow: Band) -> str:
    """Return a picture as SVG, with a row for each layer and a logarithmic axis.

    A bar goes from the smallest to the largest σ of the layer, with a gap at the median; the line
    to its right goes on to max |x − μ|. It is blue where the narrow norm loses nothing and
    vermilion where it does; what either loses stands at the end of the row.

    Args:
        layers: at least one.
        wide: the norm that takes more.
        narrow: the norm that takes less.
    """
    height = _TOP + _ROW * len(layers) + _BOTTOM
    bottom = height - _BOTTOM
    axis = _axis_of(layers)
    parts = [
        *_draw_band(wide, axis, bottom, 0),
        *_draw_band(narrow, axis, bottom, 1),
        *_draw_grid(axis, bottom),
        *(_draw_row(layer, wide.norm, narrow.norm, axis, row) for row, layer in enumerate(layers)),
    ]
    title = "What the norm layers get, and what float16 can take"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img">{GENERATOR}<style>{_STYLE}</style>'
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>'
        f'<text class="title" x="16" y="24">{title}</text>'
        '<text class="quiet" x="16" y="43">bar: σ from its smallest to its largest, median marked; '
        "line: on to max |x − μ|; shaded: from the least σ to the most |x − μ| that a norm takes; "
        "right: losses</text>"
        f"{''.join(parts)}</svg>\n"
    )


def _axis_of(layers: Sequence[LayerRanges]) -> Axis:
    ends = [*_WHOLE, *(x.largest_deviation for x in layers)]
    values = np.concatenate([ends, *(x.finite_scales for x in layers)])
    return Axis.over(values.astype(np.float64), logarithmic=True)


def _across(axis: Axis, value: float) -> float:
    share = float(axis.shares(np.array([max(value, axis.low)]))[0])
    return _LEFT + min(share, 1.0) * (_WIDTH - _LEFT - _RIGHT)


def _draw_band(band: Band, axis: Axis, bottom: int, number: int) -> Iterator[str]:
    left, right = _across(axis, band.low), _across(axis, band.high)
    top = _TOP - 36 + 17 * number
    yield (
        f'<rect x="{left:.1f}" y="{top}" width="{right - left:.1f}" height="{bottom - top}" '
        f'fill="{_SHADES[number]}"/>'
        f'<text x="{left + 6:.1f}" y="{top + 13}">{escape(band.name)}</text>'
        f'<text class="quiet" x="{_ENDS[number]}" y="{_TOP - 7}" text-anchor="end">'
        f"{escape(band.name.split()[0])}</text>"
    )


def _draw_grid(axis: Axis, bottom: int) -> Iterator[str]:
    powers = range(int(np.ceil(np.log10(axis.low))), int(np.floor(np.log10(axis.high))) + 1)
    for power in powers[:: -(-len(powers) // 12)]:
        x = _across(axis, 10.0**power)
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>'
        label = f"{10.0**power:g}" if -4 < power < 5 else f"1e{power}"
        place = f'x="{x:.1f}" y="{bottom + 18}" text-anchor="middle"'
        yield f'<text class="quiet" {place}>{label}</text>'


def _draw_row(layer: LayerRanges, wide: str, narrow: str, axis: Axis, row: int) -> str:
    top = _TOP + _ROW * row
    text = top + _ROW - 5
    name = layer.name if len(layer.name) <= _LONGEST_NAME else f"…{layer.name[-_LONGEST_NAME:]}"
    cells = [f'<text x="{_LEFT - 10}" y="{text}" text-anchor="end">{escape(name)}</text>']
    for x, norm in zip(_ENDS, (wide, narrow), strict=True):
        share = layer.lost_share(norm)
        cells.append(
            f'<text x="{x}" y="{text}" text-anchor="end" fill="{_LOST if share else _KEPT}">'
            f"{format_loss(share)}</text>"
        )
    colour = _LOST if layer.lost_share(narrow) else _KEPT
    return "".join([*cells, *_draw_bar(layer, axis, top, colour)])


def _draw_bar(layer: LayerRanges, axis: Axis, top: int, colour: str) -> Iterator[str]:
    scales = layer.finite_scales
    if not len(scales):
        return
    low, middle, high = (_across(axis, float(s)) for s in np.quantile(scales, [0, 0.5, 1]))
    end = _across(axis, layer.largest_deviation)
    y, within = top + _ROW // 2, f'y="{top + 4}" height="{_ROW - 8}"'
    yield f'<line x1="{high:.1f}" x2="{end:.1f}" y1="{y}" y2="{y}" stroke="{colour}"/>'
    yield f'<line x1="{end:.1f}" x2="{end:.1f}" y1="{y - 4}" y2="{y + 4}" stroke="{colour}"/>'
    yield (
        f'<rect x="{low:.1f}" width="{max(high - low, 3):.1f}" {within} fill="{colour}">'
        f"<title>{escape(layer.name)}: σ {scales.min():.3g} to {scales.max():.3g}, "
        f"max |x − μ| {layer.largest_deviation:.3g}</title></rect>"
    )
    yield f'<rect x="{middle - 1:.1f}" width="2" {within} fill="#fff"/>'
