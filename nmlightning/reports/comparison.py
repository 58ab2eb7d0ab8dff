"""How runs compare: what differs between them, and how well each setting did over its seeds."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nmlightning.errors import InputError, nearest
from nmlightning.reports.run import Run
from nmlightning.reports.series import Series
from nmlightning.reports.spread import Spread

LAST_EPOCHS = 10
"""As many last values are averaged, as the paper's figures are."""


@dataclass(frozen=True, eq=False)
class Group:
    """The runs of one setting, which differ in their seeds only.

    Attributes:
        name: of the experiment.
        runs: one or more.
        metric: the tag that the figures are of.
    """

    name: str
    runs: Sequence[Run]
    metric: str

    @property
    def curves(self) -> list[Series]:
        """The metric of each run."""
        return [run.scalars[self.metric] for run in self.runs]

    @property
    def final(self) -> Spread:
        """The last value of each run."""
        return Spread.of([float(curve.values[-1]) for curve in self.curves])

    @property
    def best(self) -> Spread:
        """The best value of each run: the smallest of a loss, the largest of anything else."""
        best = np.nanmin if is_loss(self.metric) else np.nanmax
        return Spread.of([float(best(curve.values)) for curve in self.curves])

    @property
    def late(self) -> Spread | None:
        """The mean of the last ten values of each run, None where one has fewer."""
        if any(len(curve.values) < LAST_EPOCHS for curve in self.curves):
            return None
        return Spread.of([float(curve.values[-LAST_EPOCHS:].mean()) for curve in self.curves])

    @property
    def seconds(self) -> Spread:
        """How long a run took."""
        return Spread.of([run.seconds for run in self.runs])

    @property
    def seeds(self) -> str:
        """The seeds, in order; how many runs there are where they repeat or are not known."""
        counts = Counter(run.seed for run in self.runs)
        if None in counts:
            return f"{len(self.runs)} run{'s' * (len(self.runs) > 1)}"
        seeds = sorted((seed, count) for seed, count in counts.items() if seed is not None)
        return ", ".join(
            f"{seed} ({count} runs)" if count > 1 else f"{seed}" for seed, count in seeds
        )

    @property
    def repeats_seeds(self) -> bool:
        """Whether runs have one seed, so that deviations are not those over seeds alone."""
        return len({run.seed for run in self.runs}) < len(self.runs)

    @property
    def epochs(self) -> str:
        """How many values of the metric the runs have, which for most is that of epochs."""
        return ", ".join(map(str, sorted({len(curve.values) for curve in self.curves})))


def is_loss(metric: str) -> bool:
    """Return whether less of it is better."""
    return any(word in metric.lower() for word in ("loss", "error", "ppl", "perplexity"))


def choose_metric(runs: Sequence[Run], wanted: str | None = None) -> str:
    """Return the tag to compare: `wanted`, or else an accuracy, BLEU or a loss in validation.

    Raises:
        InputError: a run has not logged it, or none is found in all runs.
    """
    common = [tag for tag in runs[0].scalars if all(tag in run.scalars for run in runs)]
    if wanted is not None:
        lacking = next((run for run in runs if wanted not in run.scalars), None)
        if lacking is None:
            return wanted
        raise InputError(
            f"{lacking.folder} has logged no {wanted!r}.{nearest(wanted, lacking.scalars)} "
            f"{_in_common(common)}"
        )
    validation = [tag for tag in common if "val" in tag.lower()]
    accuracies = [
        tag for tag in validation if any(word in tag.lower() for word in ("top1", "acc", "bleu"))
    ]
    losses = [tag for tag in validation if is_loss(tag)]
    for tag in (*accuracies, *losses, *validation):
        return tag
    raise InputError(
        f"the runs have no validation metric in common; choose another by --metric. "
        f"{_in_common(common)}"
    )


def group_runs(runs: Iterable[Run], metric: str) -> list[Group]:
    """Return the runs of each setting, in the order given; a run without a config stays alone."""
    members: dict[Any, list[Run]] = {}
    for run in runs:
        key = frozenset(run.settings.items()) if run.settings else run.folder
        members.setdefault(key, []).append(run)
    return [Group(_name(group), group, metric) for group in members.values()]


def differing_settings(groups: Sequence[Group]) -> Mapping[str, str]:
    """Return the keys whose values are not the same in all groups, with the shortest clear name.

    What a class alone has, such as the arguments of a steering rule, differs only between groups
    that have the class.
    """
    keys = dict.fromkeys(key for group in groups for key in group.runs[0].settings)
    values = {key: [group.runs[0].settings.get(key) for group in groups] for key in keys}
    differing: list[str] = []
    for key in sorted(keys, key=lambda key: key.count(".")):
        explained = any(key.startswith(f"{parent}.") for parent in differing)
        if len({v for v in values[key] if v is not None or not explained}) > 1:
            differing.append(key)
    return {key: _shorten(key, differing) for key in keys if key in differing}


def _name(runs: Sequence[Run]) -> str:
    return ", ".join(dict.fromkeys(run.name for run in runs))


def _shorten(key: str, others: Sequence[str]) -> str:
    """Return as few last parts of a key as no other one ends in."""
    parts = key.split(".")
    endings = (".".join(parts[-count:]) for count in range(1, len(parts)))
    unique = (e for e in endings if sum(f".{other}".endswith(f".{e}") for other in others) == 1)
    return next(unique, key)


def _in_common(tags: Sequence[str]) -> str:
    shown = ", ".join(sorted(tags)[:8])
    return f"In common they have {shown}." if tags else "They have nothing in common."
