"""The cells of a comparison: a row for each setting."""

from collections.abc import Iterable, Iterator, Sequence

from nmlightning.reports.comparison import LAST_EPOCHS, Group, differing_settings
from nmlightning.reports.words import format_seconds, format_spread

SETTING_HEADINGS = ["run", "seeds", "epochs", "what differs"]
RESULT_HEADINGS = ["final", "best", f"mean of last {LAST_EPOCHS}", "time"]


def setting_rows(groups: Sequence[Group]) -> list[list[str]]:
    """Return for each group its name and its settings; what differs has a line for each one."""
    names = differing_settings(groups)
    return [
        [group.name, group.seeds, group.epochs, "\n".join(_differences(group, names.items()))]
        for group in groups
    ]


def result_rows(groups: Sequence[Group]) -> list[list[str]]:
    """Return for each group how well and how fast it did."""
    return [
        [
            *(format_spread(s, group.metric) for s in (group.final, group.best, group.late)),
            format_seconds(group.seconds.mean),
        ]
        for group in groups
    ]


def _differences(group: Group, names: Iterable[tuple[str, str]]) -> Iterator[str]:
    settings = group.runs[0].settings
    for key, name in names:
        if key in settings:
            yield f"{name}: {settings[key]}"
