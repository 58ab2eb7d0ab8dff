"""Formats numbers, means with their standard deviations, and tables for the width there is."""

import io
import math
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from nmlightning.errors import lay_out, terminal_width

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.text import Text


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


_FILE_WIDTH = 10_000  # columns of what is no terminal, where nothing is cut
_GAP = 2  # columns between two of a table, and around all


class Report:
    """What a function did: `print` and the end of a notebook's cell show what it describes."""

    def describe(self) -> str:
        """Return it in words, with the reasons, in lines as long as they are."""
        raise NotImplementedError

    def __str__(self) -> str:
        return lay_out(self.describe(), terminal_width())

    def __repr__(self) -> str:
        return str(self)


class Grid:
    """A table for `rich.print` and `print` whose words stay whole in any width.

    Where the columns do not fit side by side they come in parts below each other, each of which
    begins with the first column. `numbers` are aligned to the right, and their cells stay whole.
    """

    def __init__(
        self,
        headings: Sequence[str],
        rows: Sequence[Sequence[Union[str, "Text"]]],
        title: str = "",
        *,
        numbers: bool = False,
    ) -> None:
        self.columns = list(zip(headings, *rows, strict=True))
        self.title, self.numbers = title, numbers

    def __rich_console__(
        self, console: "Console", options: "ConsoleOptions"
    ) -> Iterator["RenderableType"]:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        if self.title:
            yield Text(lay_out(f" {self.title}", options.max_width))
        columns = [[Text(x) if isinstance(x, str) else x for x in each] for each in self.columns]
        sizes = [self._sizes(column) for column in columns]
        room = options.max_width - 2 * _GAP - max(least for least, _ in sizes[1:])
        if sizes[0][0] > room:  # then a name's lines end with dots, so far as there are any
            wrap = partial(textwrap.wrap, width=max(room, 1), break_long_words=False)
            lines = ("\n".join(wrap(str(name).replace(".", ". "))) for name in columns[0])
            columns[0] = [Text(text.replace(". ", ".")) for text in lines]
            sizes[0] = self._sizes(columns[0])
        while len(columns) > 1:
            totals = accumulate(least + _GAP for least, _ in sizes)
            count = max(2, sum(total <= options.max_width for total in totals))
            table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
            widths = _share_out(sizes[:count], options.max_width - _GAP * count)
            for number, (column, width) in enumerate(zip(columns, widths, strict=False)):
                justify: Any = "right" if number and self.numbers else "left"
                table.add_column(column[0], width=width, justify=justify, overflow="fold")
            for row in zip(*(column[1:] for column in columns[:count]), strict=True):
                table.add_row(*row)
            table.leading = int(any("\n" in str(x) for column in columns[1:count] for x in column))
            yield table
            del columns[1:count], sizes[1:count]

    def _sizes(self, column: Sequence["Text"]) -> tuple[int, int]:
        """Return how wide a column has to be, and would be."""
        lines = [line for cell in column for line in str(cell).splitlines() or [""]]
        whole = [*lines[0].split(), *(lines[1:] if self.numbers else " ".join(lines).split())]
        return max(map(len, whole), default=0), max(map(len, lines))

    def __str__(self) -> str:
        from rich.console import Console

        file = io.StringIO()
        width = terminal_width() or _FILE_WIDTH
        Console(file=file, width=width, color_system=None, highlight=False).print(self)
        return "\n".join(map(str.rstrip, file.getvalue().splitlines())).strip("\n")


def _share_out(sizes: Sequence[tuple[int, int]], room: int) -> list[int]:
    """Return widths from the least to the most that each may have; who needs least gets it all."""
    widths = [least for least, _ in sizes]
    spare = room - sum(widths)
    order = sorted(range(len(sizes)), key=lambda number: sizes[number][1] - widths[number])
    for rank, number in enumerate(order):
        extra = max(0, min(sizes[number][1] - widths[number], spare // (len(sizes) - rank)))
        widths[number] += extra
        spare -= extra
    return widths


def show(what: Grid, *, err: bool = False) -> None:
    """Print a table in colours, to stdout or stderr, in the width of that."""
    from rich.console import Console

    width = terminal_width(sys.stderr if err else sys.stdout) or _FILE_WIDTH
    Console(stderr=err, width=width, highlight=False).print(what)
