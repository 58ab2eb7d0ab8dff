"""A picture of the inputs of norm layers against what float16 lets each norm take."""

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nmlightning.probe.report import LayerRanges
from nmlightning.reports.formatting import format_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GENERATOR = "generator: nmlightning"
_ENDS = (1e-5, 1e5)  # what the axis shows at least: a little more than float16 can
_LONGEST_NAME = 36  # characters
# Okabe and Ito's colours, which colour-blind people tell apart.
_KEPT, _LOST = "#0072B2", "#D55E00"
_SHADES = ("#eef1f4", "#d3e4ee")
_COLUMNS = (1.06, 1.14)  # of the losses, where the axis is from 0 to 1
_TITLE = """What the norm layers get, and what float16 can take
bar: σ from its smallest to its largest, median marked; line: on to max |x − μ|
shaded: from the least σ to the most |x − μ| that a norm takes; right: losses"""


class Band(NamedTuple):
    """The inputs that a norm can take: σ from `low` on, and |x − μ| up to `high`."""

    norm: str
    name: str
    low: float
    high: float


def draw_ranges(layers: Sequence[LayerRanges], wide: Band, narrow: Band) -> str:
    """Return a picture as SVG, with a row for each layer and a logarithmic axis.

    A bar goes from the smallest to the largest σ of the layer, with a gap at the median; the line
    to its right reaches to max |x − μ|. It is blue where the narrow norm loses nothing and
    vermilion where it does; what either loses stands at the end of the row.

    Args:
        layers: at least one.
        wide: the norm that takes more.
        narrow: the norm that takes less.
    """
    import matplotlib

    picture = io.StringIO()
    metadata = {"Creator": GENERATOR, "Date": None}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nmlightning"}):
        plot_ranges(layers, wide, narrow).savefig(picture, format="svg", metadata=metadata)
    return picture.getvalue()


def plot_ranges(layers: Sequence[LayerRanges], wide: Band, narrow: Band) -> "Figure":
    """Return the figure that `draw_ranges` writes as SVG."""
    from matplotlib.figure import Figure

    figure = Figure((9.8, 1.4 + 0.22 * len(layers)), layout="constrained")
    axes = figure.subplots()
    axes.set_title(_TITLE, loc="left", fontsize=9, pad=24)
    for band, shade, column in zip((wide, narrow), _SHADES, _COLUMNS, strict=True):
        axes.axvspan(band.low, band.high, color=shade, label=band.name)
        for row, text, colour in _column(layers, band):
            across = axes.get_yaxis_transform()
            axes.text(column, row, text, color=colour, ha="right", va="center", transform=across)
    values = np.concatenate([_ENDS, *((x.largest_deviation, *x.finite_scales) for x in layers)])
    positive = values[np.isfinite(values) & (values > 0)]
    for row, layer in enumerate(layers):
        if len(scales := layer.finite_scales):
            low, median, high = np.quantile(scales, [0, 0.5, 1]).clip(positive.min())
            colour = _LOST if layer.lost_share(narrow.norm) else _KEPT
            axes.barh(row, high - low, 0.4, low, facecolor=colour, edgecolor=colour, linewidth=3)
            ends = [high, layer.largest_deviation]
            axes.plot(ends, [row, row], color=colour, marker="|", markevery=[1])
            axes.plot(median, row, color="white", marker="|")
    axes.set(xscale="log", xlim=(positive.min(), positive.max()), ylim=(len(layers) - 0.5, -1.5))
    axes.set_yticks(range(len(layers)), [_shorten(layer.name) for layer in layers])
    axes.tick_params("y", length=0)
    axes.spines[:].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderpad=0)
    return figure


def _column(layers: Sequence[LayerRanges], band: Band) -> Iterator[tuple[int, str, str]]:
    """Yield the row, text and colour of a column's heading, and of what the norm loses."""
    yield -1, band.name.split()[0], "gray"
    for row, layer in enumerate(layers):
        share = layer.lost_share(band.norm)
        yield row, format_loss(share), _LOST if share else _KEPT


def _shorten(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"…{name[-_LONGEST_NAME:]}"
