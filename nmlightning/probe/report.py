"""The ranges that a probe measured, what norms lose that keep all in float16, and a chart of it."""

import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nmlightning.name_patterns import by_reason
from nmlightning.reports.formatting import Grid, Report, format_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.text import Text


RIGHT, INPUT = "right", "input"
# The smallest normal number, and from where on a number is rounded to infinity.
DTYPES = {"float16": (2.0**-14, 65520.0), "bfloat16": (2.0**-126, 2.0**128 * (1 - 2.0**-9))}


@dataclass(frozen=True, eq=False)
class LayerRanges:
    """One norm layer, over all batches.

    A channel of a batch norm, or a token of a layer norm, is one entry for each batch. Of a batch
    norm in evaluation σ and μ are the running ones.
    """

    name: str  # of the layer in the model
    type_name: str  # of its class
    kind: str  # `batch`, `layer`, `rms`, `instance` or `group`
    values: int  # how many share a mean and a scale
    eps: float
    scales: NDArray[np.float32]  # (K,) the standard deviation σ of each entry, in float32
    deviations: NDArray[np.float32]  # (K,) max |x − μ| of each entry
    offset: float  # the largest |μ|/σ
    # For each norm how many entries came out how; "right" and "input" among them.
    outcomes: Mapping[str, Mapping[str, int]]
    largest: float = float("nan")  # finite |x|
    # Of what is stored in float16 the shares that become inf, 0 and subnormal.
    held: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def finite_scales(self) -> NDArray[np.float32]:
        """The σ that are finite; all are, unless the network itself gives inf or NaN."""
        return self.scales[np.isfinite(self.scales)]

    @property
    def largest_deviation(self) -> float:
        """The largest finite |x − μ|; NaN if there is none."""
        finite = self.deviations[np.isfinite(self.deviations)]
        return float(finite.max()) if len(finite) else float("nan")

    def count(self, norm: str, outcome: str) -> int:
        """Return how many entries came out so; 0 if the norm was not tried on this layer."""
        return self.outcomes.get(norm, {}).get(outcome, 0)

    def lost(self, norm: str) -> dict[str, int]:
        """Return how many entries the norm itself loses, by how they fail."""
        counts = self.outcomes.get(norm, {})
        return {name: n for name, n in counts.items() if n and name not in (RIGHT, INPUT)}

    def lost_share(self, norm: str) -> float | None:
        """Return the share of entries that the norm loses, None if it was not tried here."""
        if norm not in self.outcomes:
            return None
        return sum(self.lost(norm).values()) / sum(self.outcomes[norm].values())

    def input_share(self) -> float:
        """Return the share of entries that are lost when x is rounded to float16."""
        return max(counts.get(INPUT, 0) for counts in self.outcomes.values()) / len(self.scales)

    def squares(self, dtype: str = "float16") -> dict[str, float]:
        """Return the shares of entries whose squares d², d being x − μ, leave a dtype.

        "overflow": the largest one; "sum_overflow": the sum n σ²; "underflow": σ² > 0, below the
        smallest normal number.
        """
        smallest, largest = DTYPES[dtype]
        squared, peaks = (np.square(x, dtype=np.float64) for x in (self.scales, self.deviations))
        lost = {
            "overflow": peaks > largest,
            "sum_overflow": self.values * squared > largest,
            "underflow": (squared > 0) & (squared < smallest),
        }
        return {name: float(found.mean()) for name, found in lost.items()}

    def as_plain(self) -> dict[str, Any]:
        finite = self.finite_scales
        low, middle, high = np.quantile(finite, [0, 0.5, 1]) if len(finite) else (np.nan,) * 3
        return {
            "name": self.name,
            "class": self.type_name,
            "kind": self.kind,
            "values": self.values,
            "eps": self.eps,
            "entries": len(self.scales),
            "sigma": {"min": _plain(low), "median": _plain(middle), "max": _plain(high)},
            "largest_deviation": _plain(self.largest_deviation),
            "largest_mean_over_sigma": _plain(self.offset),
            "largest": _plain(self.largest),
            "squares": {dtype: self.squares(dtype) for dtype in DTYPES},
            "in_float16": self.held,
            "lost_in_input": self.input_share(),
            "lost": {
                norm: {name: n / sum(counts.values()) for name, n in self.lost(norm).items()}
                for norm, counts in self.outcomes.items()
            },
        }


@dataclass(frozen=True, repr=False)
class NormRanges(Report):
    """All norms of a network; the answer of `probe_norms` and of `probe_inference`.

    It prints as `nm probe` does: the table of the layers, and the verdict.
    """

    layers: Sequence[LayerRanges]  # in the order in which the network calls them first
    norms: Sequence[str]  # that were tried in half precision, first the one to be replaced
    batches: int  # that were run
    left_out: Mapping[str, str]  # norm layers that were not measured, with the reason

    @property
    def failing(self) -> str:
        """What computes by squares, op by op in float16."""
        return self.norms[0]

    @property
    def entry(self) -> str:
        """What the entries are called."""
        return "channel" if self.failing == FAILING else "row"

    def lost_share(self, norm: str) -> float:
        """Return the share of entries that a norm loses, of the layers that it was tried on."""
        layers = [layer for layer in self.layers if norm in layer.outcomes]
        total = sum(sum(layer.outcomes[norm].values()) for layer in layers)
        return sum(sum(layer.lost(norm).values()) for layer in layers) / total if total else 0.0

    def losing_layers(self, norm: str) -> list[LayerRanges]:
        return [layer for layer in self.layers if layer.lost(norm)]

    def input_share(self) -> float:
        """Return the share of entries that no norm brings back."""
        total = sum(len(layer.scales) for layer in self.layers)
        return sum(layer.input_share() * len(layer.scales) for layer in self.layers) / total

    def table(self) -> Grid:
        """Return a row for each layer: its ranges, and the share that each norm loses.

        In evaluation a norm that loses nothing has no column.
        """
        lost_in_input = self.input_share() > 0
        evaluated = self.failing != FAILING
        norms = [norm for norm in self.norms if not evaluated or self.losing_layers(norm)]
        squared = evaluated and any("float16_sums" in layer.outcomes for layer in self.layers)
        sizes = ["max |x|", "σ min", "σ max", *["x² → ∞", "x² → 0"] * squared]
        sizes = sizes if evaluated else ["σ min", "σ max", "max |x − μ|"]
        headings = ["norm layer", *sizes, *(NAMES[norm] for norm in norms)]
        rows: list[list[str | Text]] = []
        for layer in self.layers:
            cells = [_norm_cell(layer, norm, evaluated or norm == FAILING) for norm in norms]
            if lost_in_input:
                cells.append(_loss_cell(layer.input_share()))
            scales = layer.finite_scales
            sigma = [scales.min(), scales.max()] if len(scales) else [float("nan")] * 2
            if squared:
                shares = layer.squares() if "float16_sums" in layer.outcomes else {}
                cells = [_loss_cell(shares.get(x)) for x in ("overflow", "underflow")] + cells
            sigma = [layer.largest, *sigma] if evaluated else [*sigma, layer.largest_deviation]
            numbers = (re.sub(r"e(-?)\+?0", r"e\1", f"{size:.3g}") for size in sigma)
            rows.append([layer.name, *numbers, *cells])
        title = "x²: rows whose squares float16 does not hold"
        title += "; then rows that come out wrong" * bool(norms)
        headings += ["input"] * lost_in_input
        return Grid(headings, rows, title * squared, numbers=True)

    def describe(self) -> str:
        """Return which layers were not measured and why, and the verdict."""
        left_out = [f"left out    {line}" for line in by_reason(self.left_out, 1)]
        return "\n".join(f" {line}" for line in [*left_out, *verdict(self)])

    def __str__(self) -> str:
        return f"{self.table()}\n\n{super().__str__()}"

    def as_plain(self) -> dict[str, Any]:
        return {
            "batches": self.batches,
            "lost": {norm: self.lost_share(norm) for norm in self.norms},
            "lost_in_input": self.input_share(),
            "left_out": dict(self.left_out),
            "layers": [layer.as_plain() for layer in self.layers],
        }


def _plain(value: Any) -> float | None:
    """Return a float, or None for what JSON has no word for."""
    return float(value) if np.isfinite(value) else None


FAILING, REMEDY = "half_l2", "l1"
_HARMLESS = 0.01  # of trained weights so many are that near to 0
NAMES = {
    **{"half_l2": "L2 op by op", "l1": "L1", "linf": "L∞", "top10": "Top(10)", "range": "range"},
    **{"float16_sums": "float16 sums", "bfloat16_sums": "bfloat16 sums"},
    **{name: name for name in ("float16", "bfloat16", "scaled", "folded")},
}
FAILURE_LABELS = {
    "not finite": "inf",
    "NaN": "NaN",
    "dead": "zero",
    "wrong": "off",
    "gradient not finite": "NaN gradient",
    "gradient wrong": "gradient off",
}
CAVEAT = (
    "This is about norms that keep every value in float16. Under 16-mixed torch's norms, and ours "
    "unless stats_dtype is float16, compute in float32 and are safe."
)
CAVEAT_OF_RUNTIMES = (
    "float16 and bfloat16 round every step and sum in float32; where sums are named, and in scaled "
    "and L1, these are in half, too. A runtime that squares in float32 loses nothing."
)


def _norm_cell(layer: LayerRanges, norm: str, labelled: bool) -> "Text":
    lost = layer.lost(norm) if labelled else {}
    label = f" {FAILURE_LABELS[max(lost, key=lambda key: lost[key])]}" if lost else ""
    return _loss_cell(layer.lost_share(norm), label + ", …" * (len(lost) > 1))


def _loss_cell(share: float | None, label: str = "") -> "Text":
    from rich.text import Text

    return Text(format_loss(share) + label, "red" if share else "")


def verdict(ranges: NormRanges) -> Iterator[str]:
    """Yield the answer, its reason, and what it does not cover, a sentence or two each."""
    broken = [layer.name for layer in ranges.layers if not np.isfinite(layer.scales).all()]
    if broken:
        yield (
            f"The network itself gives inf or NaN in float32, to {_count(broken)}: first to "
            f"{broken[0]}."
        )
    lost = [layer for layer in ranges.layers if layer.input_share()]
    if lost:
        worst = max(lost, key=LayerRanges.input_share)
        yield (
            f"{format_loss(ranges.input_share())} of the {ranges.entry}s are lost before any norm, "
            f"since float16 does not hold x: most in {worst.name}, where |x − μ| is up to "
            f"{worst.largest_deviation:.3g} and |μ| up to {worst.offset:.3g} σ. No swap helps "
            "there."
        )
    yield from _training_losses(ranges) if ranges.failing == FAILING else _evaluation_losses(ranges)


def _training_losses(ranges: NormRanges) -> Iterator[str]:
    yield _losses(ranges, FAILING)
    left = format_loss(ranges.lost_share(REMEDY))
    if ranges.losing_layers(FAILING):
        others = [norm for norm in ranges.norms if norm not in (FAILING, REMEDY)]
        shares = (f"{NAMES[norm]} {format_loss(ranges.lost_share(norm))}" for norm in others)
        yield f"Swapping to {REMEDY} brings that to {left} ({', '.join(shares)})."
    elif ranges.losing_layers(REMEDY):
        yield f"{NAMES[REMEDY]} would lose {left}."
    else:
        yield "A swap gains nothing in half."
    yield CAVEAT


def _evaluation_losses(ranges: NormRanges) -> Iterator[str]:
    tried = [norm for norm in ranges.norms if any(norm in x.outcomes for x in ranges.layers)]
    yield from (_losses(ranges, norm) for norm in tried if ranges.losing_layers(norm))
    kept = [NAMES[norm] for norm in tried if not ranges.losing_layers(norm)]
    yield f"Nothing is lost by {', '.join(kept) or 'none of these'}."
    held = [(x, what, shares) for x in ranges.layers for what, shares in x.held.items()]
    for beginning, name in (("running_var", "running variances"), ("weight", "folded weights")):
        lost = [each for each in held if each[1].startswith(beginning) and _is_harmed(each[2])]
        if lost:
            layer, what, shares = max(lost, key=lambda each: max(each[2].values()))
            how = ", ".join(f"{format_loss(share)} {end}" for end, share in shares.items() if share)
            yield (
                f"float16 does not hold the {name} of {_count(lost)}: most in {layer.name}, whose "
                f"{what} becomes {how}."
            )
    yield CAVEAT_OF_RUNTIMES


def _is_harmed(shares: Mapping[str, float]) -> bool:
    """Return whether values overflow, or more than a few are too small."""
    return shares["inf"] > 0 or shares["0"] + shares["subnormal"] >= _HARMLESS


def _losses(ranges: NormRanges, norm: str) -> str:
    losing, name = ranges.losing_layers(norm), NAMES[norm] + " in half" * (norm == FAILING)
    if not losing:
        scales = np.concatenate([layer.finite_scales for layer in ranges.layers])
        sizes = f": σ is between {scales.min():.3g} and {scales.max():.3g}" if len(scales) else ""
        more = " more" if ranges.input_share() else ""
        return f"{name} would lose no channel{more}{sizes}."
    outcomes = [layer.outcomes[norm] for layer in ranges.layers if norm in layer.outcomes]
    total = sum(sum(counts.values()) for counts in outcomes)
    failures = sum((Counter(layer.lost(norm)) for layer in losing), Counter[str]())
    how = ", ".join(
        f"{format_loss(n / total)} {FAILURE_LABELS[name]}" for name, n in failures.most_common()
    )
    return (
        f"{name} would lose {format_loss(ranges.lost_share(norm))} of the {ranges.entry}s, in "
        f"{len(losing)} of {_count(ranges.layers)} ({how})."
    )


def _count(layers: object) -> str:
    number = len(layers)  # type: ignore[arg-type]
    return f"{number} layer{'s' * (number != 1)}"


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
    to its right reaches to max |x − μ|. It is blue where the norm that takes less loses nothing and
    vermilion where it does; what either loses stands at the end of the row.
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
