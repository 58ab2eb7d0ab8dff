"""Formats numbers, and means with their standard deviations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MeanStd:
    """Mean and sample standard deviation (divisor n − 1; NaN for n = 1) of one number over runs."""

    mean: float
    std: float
    note: str = ""  # how many of several are not finite, in which case neither is the mean

    @classmethod
    def of(cls, values: Sequence[float]) -> "MeanStd":
        """Return those of one or more values."""
        count = len(values)
        lost = count - sum(map(math.isfinite, values))
        with np.errstate(all="ignore"):
            std = float(np.std(values, ddof=1)) if count > 1 and not lost else math.nan
            note = f" ({lost} of {count} runs)" if count > 1 and lost else ""
            return cls(float(np.mean(values)), std, note)


def is_share(metric: str) -> bool:
    """Return whether a metric is a share of 1, which is shown in percent."""
    return any(word in metric.lower() for word in ("top1", "top5", "acc"))


def format_value(value: float, metric: str) -> str:
    """Return `93.07 %`, `0.2713`, `27.31` or `3,529`: large numbers, and BLEU, have few places."""
    if is_share(metric):
        return f"{100 * value:.2f} %"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 10 or "bleu" in metric.lower() else f"{value:.4f}"


def format_mean_std(value: MeanStd | None, metric: str) -> str:
    """Return `93.07 ± 0.11 %` or `0.2713 ± 0.0021`, the mean alone where there is no deviation."""
    if value is None:
        return "—"
    mean = format_value(value.mean, metric)
    if math.isnan(value.std):
        return mean + value.note
    return f"{mean.removesuffix(' %')} ± {format_value(value.std, metric)}"


def format_seconds(seconds: float) -> str:
    """Return `3 h 2 min`, `1 min 5 s` or `7.2 s`."""
    if not math.isfinite(seconds):
        return "—"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def format_loss(share: float | None) -> str:
    """Return `37 %`; `<1 %` and `>99 %` for what rounding would hide; `—` for None."""
    if share is None:
        return "—"
    percent = 100 * share
    if 0 < percent < 1:
        return "<1 %"
    if 99 < percent < 100:
        return ">99 %"
    return f"{percent:.0f} %"
