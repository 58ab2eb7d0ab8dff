"""The cells of a comparison: a row for each setting."""

from collections.abc import Iterable, Iterator, Sequence

from nmlightning.reports.comparison import LAST_EPOCHS, Group, differing_settings
from nmlightning.reports.spread import Spread
from nmlightning.reports.words import format_seconds, format_spread

SETTING_HEADINGS = ["run", "seeds", "epochs", "what differs"]


def setting_rows(groups: Sequence[Group]) -> list[list[str]]:
    """Return for each group its name and its settings; what differs has a line for each one."""
    names = differing_settings(groups)
    return [
        [group.name, group.seeds, group.epochs, "\n".join(_differences(group, names.items()))]
        for group in groups
    ]


def result_columns(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Return how well and how fast each group did: the cells under each heading.

    There is no column of means of the last epochs where no run has so many.
    """
    spreads: dict[str, list[Spread | None]] = {
        "final": [group.final for group in groups],
        "best": [group.best for group in groups],
        f"mean of last {LAST_EPOCHS}": [group.late for group in groups],
    }
    cells = {
        heading: [format_spread(s, g.metric) for s, g in zip(column, groups, strict=True)]
        for heading, column in spreads.items()
        if any(column)
    }
    return {**cells, "time": [format_seconds(group.seconds.mean) for group in groups]}


def _differences(group: Group, names: Iterable[tuple[str, str]]) -> Iterator[str]:
    settings = group.runs[0].settings
    for key, name in names:
        if key in settings:
            yield f"{name}: {settings[key]}"
