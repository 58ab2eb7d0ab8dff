"""What half precision would do to the norms of a network, in sentences."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from nmlightning.reports.norm_ranges import LayerRanges, NormRanges
from nmlightning.reports.words import format_loss

FAILING, REMEDY = "half_l2", "l1"
NAMES = {"half_l2": "L2 op by op", "l1": "L1", "linf": "L∞", "top10": "Top(10)", "range": "range"}
WAYS = {
    "not finite": "inf",
    "dead": "dead",
    "wrong": "off",
    "gradient not finite": "NaN gradient",
    "gradient wrong": "gradient off",
}
HONESTLY = (
    "This is about norms that keep every value in float16. Under 16-mixed torch's norms, and ours "
    "unless stats_dtype is float16, compute in float32 and are safe."
)


def verdict(ranges: NormRanges) -> list[str]:
    """Return the answer, its reason, and what it does not cover, a sentence or two each."""
    return [
        *_say_what_is_broken(ranges),
        *_say_what_no_norm_mends(ranges),
        _say_what_fails(ranges),
        *_say_what_helps(ranges),
        HONESTLY,
    ]


def _say_what_is_broken(ranges: NormRanges) -> Iterator[str]:
    broken = [layer.name for layer in ranges.layers if not np.isfinite(layer.scales).all()]
    if broken:
        yield (
            f"The network itself gives inf or NaN in float32, to {_count(broken)}: first to "
            f"{broken[0]}."
        )


def _say_what_fails(ranges: NormRanges) -> str:
    losing = ranges.losing_layers(FAILING)
    if not losing:
        scales = np.concatenate([layer.finite_scales for layer in ranges.layers])
        sizes = f": σ is between {scales.min():.3g} and {scales.max():.3g}" if len(scales) else ""
        more = " more" if ranges.input_share() else ""
        return f"{NAMES[FAILING]} in half would lose no channel{more}{sizes}."
    total = sum(len(layer.scales) for layer in ranges.layers)
    ways = sum((Counter(layer.lost(FAILING)) for layer in losing), Counter[str]())
    how = ", ".join(f"{format_loss(n / total)} {WAYS[way]}" for way, n in ways.most_common())
    return (
        f"{NAMES[FAILING]} in half would lose {format_loss(ranges.lost_share(FAILING))} of the "
        f"channels, in {len(losing)} of {_count(ranges.layers)} ({how})."
    )


def _say_what_helps(ranges: NormRanges) -> Iterator[str]:
    if not ranges.losing_layers(FAILING):
        if ranges.losing_layers(REMEDY):
            yield f"{NAMES[REMEDY]} would lose {format_loss(ranges.lost_share(REMEDY))}."
        else:
            yield "A swap gains nothing in half."
        return
    others = ", ".join(
        f"{NAMES[norm]} {format_loss(ranges.lost_share(norm))}"
        for norm in ranges.norms
        if norm not in (FAILING, REMEDY)
    )
    left = format_loss(ranges.lost_share(REMEDY))
    yield f"Swapping to {REMEDY} brings that to {left} ({others})."


def _say_what_no_norm_mends(ranges: NormRanges) -> Iterator[str]:
    lost = [layer for layer in ranges.layers if layer.input_share()]
    if lost:
        worst = max(lost, key=LayerRanges.input_share)
        yield (
            f"{format_loss(ranges.input_share())} of the channels are lost before any norm, since "
            f"float16 does not hold x: most in {worst.name}, where |x − μ| is up to "
            f"{worst.largest_deviation:.3g} and |μ| up to {worst.offset:.3g} σ. No swap helps "
            "there."
        )


def _count(layers: object) -> str:
    number = len(layers)  # type: ignore[arg-type]
    return f"{number} layer{'s' * (number != 1)}"
