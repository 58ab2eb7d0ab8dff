import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from nmlightning.probe import report
from nmlightning.probe.report import CAVEAT, LayerRanges, NormRanges, verdict
from nmlightning.reports.formatting import format_loss

NORMS = ("half_l2", "l1", "linf", "top10")
BANDS = (
    report.Band("l1", "L1 in half", 6.1e-5, 65504.0),
    report.Band("half_l2", "L2 in half, op by op", 0.0246, 255.97),
)


def layer(
    name: str = "bn",
    scales: list[float] | None = None,
    lost: Mapping[str, Mapping[str, int]] | None = None,
    **given: Any,
) -> LayerRanges:
    """Return a batch norm of four channels; of each norm what is not lost is right."""
    sizes = np.array([0.5, 1.0, 1.0, 2.0] if scales is None else scales, np.float32)
    outcomes = {
        norm: {"right": len(sizes) - sum(ways.values()), **ways}
        for norm in given.pop("norms", NORMS)
        for ways in ((lost or {}).get(norm, {}),)
    }
    settings = {"type_name": "BatchNorm2d", "kind": "batch", "values": 64, "eps": 1e-5}
    settings |= {"deviations": 4 * sizes, "offset": 0.5, "outcomes": outcomes, **given}
    return LayerRanges(name=name, scales=sizes, **settings)


def of(*layers: LayerRanges) -> NormRanges:
    return NormRanges(layers, NORMS, 1, {})


FAILS = of(
    layer("conv1", lost={"half_l2": {"dead": 4}}, scales=[300, 300, 300, 300]),
    layer("conv2", lost={"half_l2": {"gradient not finite": 1}, "l1": {"wrong": 0}}),
    layer("norm", kind="layer", norms=("half_l2", "l1")),
)


def test_shares_of_lost_entries() -> None:
    assert FAILS.lost_share("half_l2") == 5 / 12
    assert FAILS.lost_share("l1") == FAILS.lost_share("linf") == FAILS.input_share() == 0
    assert [x.name for x in FAILS.losing_layers("half_l2")] == ["conv1", "conv2"]
    assert FAILS.layers[1].lost("half_l2") == {"gradient not finite": 1}
    assert FAILS.layers[1].lost("l1") == {}
    assert FAILS.layers[2].lost_share("linf") is None


def test_input_losses_are_not_the_norms() -> None:
    ranges = of(layer(lost={key: {"input": 3} for key in NORMS}))
    assert (ranges.lost_share("half_l2"), ranges.input_share()) == (0, 3 / 4)


def test_as_plain_is_json() -> None:
    broken = layer("x", scales=[math.nan, 1.0, math.inf, 2.0])
    plain = json.loads(json.dumps(of(*FAILS.layers, broken).as_plain(), allow_nan=False))
    assert plain["lost"]["half_l2"] == 5 / 16
    first, _, _, last = plain["layers"]
    assert first["lost"] == {"half_l2": {"dead": 1.0}, "l1": {}, "linf": {}, "top10": {}}
    assert first["sigma"] == {"min": 300.0, "median": 300.0, "max": 300.0}
    assert last["sigma"] == {"min": 1.0, "median": 1.5, "max": 2.0}
    assert last["largest_deviation"] == 8.0


@pytest.mark.parametrize(
    ("share", "words"),
    [(None, "—"), (0, "0 %"), (1e-5, "<1 %"), (0.374, "37 %"), (0.999, ">99 %"), (1, "100 %")],
)
def test_format_loss_rounds_nothing_away(share: float | None, words: str) -> None:
    assert format_loss(share) == words


def test_verdict_of_failing_layers() -> None:
    assert list(verdict(FAILS)) == [
        "L2 op by op in half would lose 42 % of the channels, in 2 of 3 layers (33 % zero, 8 % "
        "NaN gradient).",
        "Swapping to l1 brings that to 0 % (L∞ 0 %, Top(10) 0 %).",
        CAVEAT,
    ]


def test_verdict_without_losses() -> None:
    assert list(verdict(of(layer()))) == [
        "L2 op by op in half would lose no channel: σ is between 0.5 and 2.",
        "A swap gains nothing in half.",
        CAVEAT,
    ]


def test_verdict_of_unfixable_channels() -> None:
    scales = [math.nan, 1.0, 1.0, 1.0]
    broken = layer("a", scales=scales, lost={key: {"input": 1} for key in NORMS})
    first, lost, then, _, _ = verdict(of(layer("b"), broken))
    assert first == "The network itself gives inf or NaN in float32, to 1 layer: first to a."
    assert lost == (
        "12 % of the channels are lost before any norm, since float16 does not hold x: most in a, "
        "where |x − μ| is up to 4 and |μ| up to 0.5 σ. No swap helps there."
    )
    assert then.startswith("L2 op by op in half would lose no channel more: σ is between ")


def test_verdict_counts_losses_of_the_remedy() -> None:
    ranges = of(layer(lost={"half_l2": {"dead": 2}, "l1": {"wrong": 1}}))
    assert list(verdict(ranges))[1] == "Swapping to l1 brings that to 25 % (L∞ 0 %, Top(10) 0 %)."


def bars_of(figure: Figure) -> list[tuple[float, float, Any]]:
    """Return where the bar of each layer begins and ends, and its colour."""
    bars = (bar for bars in figure.axes[0].containers for bar in bars)
    return [(b.get_x(), b.get_x() + b.get_width(), b.get_facecolor()) for b in bars]


def test_plot_ranges_has_a_bar_from_the_least_to_the_largest_scale() -> None:
    small, large = layer("<small>", [0.01, 0.1, 0.1, 1]), layer("large", [1, 10, 10, 100])
    failing = layer("fails", [1e-3, 1e-3, 1e-3, 1e-2], lost={"half_l2": {"dead": 1}})
    figure = report.plot_ranges([small, large, failing], *BANDS)
    bars = bars_of(figure)
    ends = [end for bar in bars for end in bar[:2]]
    assert ends == pytest.approx([0.01, 1, 1, 100, 1e-3, 1e-2])
    assert bars[0][2] == bars[1][2] != bars[2][2]
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["L1", "0 %", "0 %", "0 %", "L2", "0 %", "0 %", "25 %"]
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["<small>", "large", "fails"]


def test_draw_ranges_writes_svg_with_text_and_its_mark() -> None:
    picture = report.draw_ranges([layer("<a & b>")], *BANDS)
    texts = {text.text for text in ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")}
    assert {"<a & b>", "0 %", "L1 in half", "L2 in half, op by op"} <= texts
    assert report.GENERATOR in picture
    assert picture == report.draw_ranges([layer("<a & b>")], *BANDS)


@pytest.mark.parametrize(
    "scales", [[0.0] * 4, [0.0, 1e-30, 1.0, 1e30], [math.nan] * 4, [math.inf, 1.0, 1.0, 1.0]]
)
def test_draw_ranges_takes_extremes(scales: list[float]) -> None:
    assert "nan" not in report.draw_ranges([layer("bn", scales)], *BANDS).lower()
    for left, end, _ in bars_of(report.plot_ranges([layer("bn", scales)], *BANDS)):
        assert 0 < left <= end < 1.01e30
