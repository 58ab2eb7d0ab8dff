"""Comparison of runs: what differs between them, and how well each setting did over its seeds."""

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from nmlightning.errors import InputError, nearest
from nmlightning.reports.formatting import MeanStd, Report, format_mean_std, format_seconds
from nmlightning.reports.run import CSV_FILE, Run, Series, event_files

SETTING_HEADINGS = ["run", "seeds", "epochs", "what differs"]
_LAST_EPOCHS = 10  # are averaged, as the paper's figures are
_LENGTHS = [f"trainer.{end}_{of}" for end in ("max", "min") for of in ("epochs", "steps", "time")]


@dataclass(frozen=True, eq=False, repr=False)
class Group(Report):
    """The runs of one setting, which differ in their seeds only, with the tag of their figures."""

    name: str
    runs: Sequence[Run]
    metric: str

    def describe(self) -> str:
        """Return the runs, their seeds, and how well they did."""
        final, best = (format_mean_std(value, self.metric) for value in (self.final, self.best))
        return f"{self.name} (seeds {self.seeds}): {self.metric} {final}, at best {best}"

    @property
    def curves(self) -> list[Series]:
        return [run.scalars[self.metric] for run in self.runs]

    @property
    def final(self) -> MeanStd:
        """The last value of each run."""
        return MeanStd.of([float(curve.values[-1]) for curve in self.curves])

    @property
    def best(self) -> MeanStd:
        """The best value of each run: the smallest of a loss, the largest of anything else."""
        best = (np.fmin if is_loss(self.metric) else np.fmax).reduce  # NaN if all are
        return MeanStd.of([float(best(curve.values)) for curve in self.curves])

    @property
    def late(self) -> MeanStd | None:
        """The mean of the last ten values of each run, None where one has fewer."""
        ends = [curve.values[-_LAST_EPOCHS:] for curve in self.curves]
        if any(len(end) < _LAST_EPOCHS for end in ends):
            return None
        return MeanStd.of([float(end.mean()) for end in ends])

    @property
    def seconds(self) -> MeanStd:
        return MeanStd.of([run.seconds or math.nan for run in self.runs])  # of one moment none

    @property
    def seeds(self) -> str:
        """The seeds, in order; how many runs there are where they repeat or are not known."""
        counts = Counter(run.seed for run in self.runs)
        if None in counts:
            return f"{len(self.runs)} run{'s' * (len(self.runs) > 1)}"
        seeds = sorted((seed, count) for seed, count in counts.items() if seed is not None)
        return ", ".join(f"{seed} ({n} runs)" if n > 1 else f"{seed}" for seed, n in seeds)

    @property
    def repeats_seeds(self) -> bool:
        """True if runs share a seed, so that deviations are not those over seeds alone."""
        return len({run.seed for run in self.runs}) < len(self.runs)

    @property
    def epochs(self) -> str:
        """The numbers of values of the metric, which for most runs are those of epochs."""
        return ", ".join(map(str, sorted({len(curve.values) for curve in self.curves})))


def is_loss(metric: str) -> bool:
    """Return whether less of it is better."""
    return any(word in metric.lower() for word in ("loss", "error", "ppl", "perplexity"))


def choose_metric(runs: Sequence[Run], wanted: str | None = None) -> str:
    """Return the tag to compare: `wanted`, or an accuracy, BLEU or loss, of validation first."""
    if not any(run.scalars for run in runs):
        raise InputError(f"{runs[0].folder} has no metrics yet: nothing was logged to it.")
    common = [tag for tag in runs[0].scalars if all(tag in run.scalars for run in runs)]
    if wanted is not None:
        lacking = next((run for run in runs if wanted not in run.scalars), None)
        if lacking is None:
            return wanted
        raise InputError(
            f"{lacking.folder} has logged no {wanted!r}.{nearest(wanted, lacking.scalars)} "
            f"{_in_common(common)}"
        )
    words = ("top1", "acc", "bleu")
    for part in ("val", "train"):
        tags = [tag for tag in common if part in tag.lower()]
        accuracies = [tag for tag in tags if any(word in tag.lower() for word in words)]
        for tag in (*accuracies, *filter(is_loss, tags), *tags):
            return tag
    raise InputError(
        f"the runs have no metric of validation or training in common; choose another by --metric. "
        f"{_in_common(common)}"
    )


def group_runs(runs: Iterable[Run], metric: str) -> list[Group]:
    """Return the runs of each setting, in the order given; a run without a config stays alone.

    Settings whose runs have one name are numbered.
    """
    members: dict[Any, list[Run]] = {}
    for run in runs:
        key = frozenset(run.settings.items()) if run.settings else run.folder
        members.setdefault(key, []).append(run)
    names = [", ".join(dict.fromkeys(run.name for run in group)) for group in members.values()]
    for name in {name for name in names if names.count(name) > 1}:
        for number in range(1, names.count(name) + 1):
            names[names.index(name)] = f"{name} ({number})"
    return [Group(name, runs, metric) for name, runs in zip(names, members.values(), strict=True)]


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


def setting_rows(groups: Sequence[Group]) -> list[list[str]]:
    """Return the cells under SETTING_HEADINGS of each group; what differs has a line a setting."""
    names = differing_settings(groups)
    rows = []
    for group in groups:
        settings = group.runs[0].settings
        lines = [f"{name}: {settings[key]}" for key, name in names.items() if key in settings]
        rows.append([group.name, group.seeds, group.epochs, "\n".join(lines)])
    return rows


def result_columns(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Return how well and how fast each group did: the cells under each heading."""
    columns: dict[str, list[MeanStd | None]] = {
        "final": [group.final for group in groups],
        "best": [group.best for group in groups],
        f"mean of last {_LAST_EPOCHS}": [group.late for group in groups],
    }
    cells = {
        heading: [format_mean_std(x, g.metric) for x, g in zip(column, groups, strict=True)]
        for heading, column in columns.items()
        if any(column)
    }
    return {**cells, "time": [format_seconds(group.seconds.mean) for group in groups]}


def _shorten(key: str, others: Sequence[str]) -> str:
    """Return as few last parts of a key as no other one ends in."""
    parts = key.split(".")
    endings = (".".join(parts[-count:]) for count in range(1, len(parts)))
    unique = (e for e in endings if sum(f".{other}".endswith(f".{e}") for other in others) == 1)
    return next(unique, key)


def _in_common(tags: Sequence[str]) -> str:
    shown = ", ".join(sorted(tags)[:8])
    return f"In common they have {shown}." if tags else "They have nothing in common."


def leave_out_unmeasured(
    runs: Sequence[Run], wanted: str | None
) -> tuple[Sequence[Run], dict[Path, str]]:
    """Return the runs that got to a validation, and why the others did not.

    Where none has, those that have logged anything, or else all.
    """
    with_val = [r for r in runs if any("val" in x.lower() or x == wanted for x in r.scalars)]
    measured = with_val or [run for run in runs if run.scalars] or runs
    others = [run.folder for run in runs if run not in measured]
    return measured, {x: f"{x} has logged nothing in validation yet." for x in others}


def join_resumed(runs: Sequence[Run]) -> list[Run]:
    """Return the runs, each with what was logged before it in the run that it resumes.

    A run resumes another of its settings, but for its length, and seed, if its config names
    a checkpoint of that one, or if their recordings are of one run. Both are one, and so are
    several that resume the same: it is shown as it got furthest, and last.
    """
    resumed = find_resumed(runs)
    families: dict[Path, list[Run]] = {}
    for run in runs:
        chain = [run]  # after the one that it resumes, after the one that this resumes, and so on
        while (earlier := resumed[chain[0].folder]) is not None and earlier not in chain:
            chain.insert(0, earlier)
        families.setdefault(chain[0].folder, []).append(reduce(_join, chain))
    furthest = []
    for family in families.values():
        best = max(reversed(family), key=_last_step)
        parts = dict.fromkeys([*best.parts, *(part for run in family for part in run.parts)])
        furthest.append(replace(best, parts=tuple(parts)))
    return furthest


def find_resumed(runs: Sequence[Run]) -> dict[Path, Run | None]:
    return {run.folder: _resumed_run(run, runs) for run in runs}


def _resumed_run(run: Run, runs: Sequence[Run]) -> Run | None:
    """Return the run that this one resumes; the latest one beside it where several could be."""
    settings = _settings_but_length(run)
    others = [r for r in runs if r is not run and r.seed == run.seed]
    alike = [r for r in others if _settings_but_length(r) == settings]
    shared = [_shared_with_checkpoint(r, run) for r in alike]
    most = max(shared, default=0)
    by_checkpoint = [r for r, parts in zip(alike, shared, strict=True) if 0 < parts == most]
    by_recording = [r for r in alike if _is_recorded_by(r, run)]
    # The checkpoint may have been kept elsewhere, or moved.
    is_lost = run.checkpoint and not _place_of(run, run.checkpoint.parent.parent / "config.yaml")
    by_steps = [r for r in alike if is_lost and _first_step(r) < _first_step(run) < math.inf]
    return max(
        by_checkpoint or by_recording or by_steps,
        key=lambda r: (r.folder.parent == run.folder.parent, _first_step(r)),
        default=None,
    )


def _settings_but_length(run: Run) -> dict[str, Any]:
    return {key: value for key, value in run.settings.items() if key not in _LENGTHS}


def _shared_with_checkpoint(earlier: Run, run: Run) -> int:
    """Return how many last parts of the earlier run's folder one above the checkpoint has, or 0.

    Two at least count, since runs are moved; where the checkpoint exists, its own folder and copies
    of that alone.
    """
    if run.checkpoint is None:
        return 0
    folder, above = earlier.folder.resolve(), list(run.checkpoint.parents)
    if found := _place_of(run, run.checkpoint):
        above = [p for p in found.resolve().parents if _is_same_or_copy(p, folder)]
    pairs = [zip(reversed(folder.parts), reversed(p.parts), strict=False) for p in above]
    shared = [len(list(takewhile(lambda pair: pair[0] == pair[1], each))) for each in pairs]
    return max((count for count in shared if count > 1), default=0)


def _place_of(run: Run, path: Path) -> Path | None:
    """Return where a path is that a run's config names, a relative one from the run's project."""
    places = (above / path for above in Path(os.path.abspath(run.folder)).parents)
    return next(filter(os.path.exists, places), None)


def _is_same_or_copy(place: Path, folder: Path) -> bool:
    """Return whether both are one, or share the name of an event file or what a CSV holds."""
    if place == folder or place.name != folder.name:
        return place == folder
    tables = [p / CSV_FILE for p in (place, folder)]
    if all(map(os.path.isfile, tables)):
        return tables[0].read_bytes() == tables[1].read_bytes()
    return bool({e.name for e in event_files(place)} & {e.name for e in event_files(folder)})


def _is_recorded_by(earlier: Run, run: Run) -> bool:
    names = [getattr(x.norms, "provenance", {}).get("run") for x in (earlier, run)]
    same = names[0] is not None and names[0] == names[1]
    return same and _first_step(earlier) < _first_step(run)


def _join(joined: Run, later: Run) -> Run:
    """Return the later run after what the other ones logged before its first step."""
    start, nothing = _first_step(later), Series(np.zeros(0, np.int64), np.zeros(0))
    scalars = {}
    for tag in dict.fromkeys([*joined.scalars, *later.scalars]):
        old, new = joined.scalars.get(tag, nothing), later.scalars.get(tag, nothing)
        kept = old.steps < start
        scalars[tag] = Series(
            np.append(old.steps[kept], new.steps), np.append(old.values[kept], new.values)
        )
    return replace(
        later,
        scalars=scalars,
        seconds=joined.seconds + later.seconds if later.scalars else joined.seconds,
        norms=later.norms or joined.norms,
        parts=(*joined.parts, later.folder),
    )


def _first_step(run: Run) -> float:
    return min((float(s.steps[0]) for s in run.scalars.values() if len(s.steps)), default=np.inf)


def _last_step(run: Run) -> float:
    return max((float(s.steps[-1]) for s in run.scalars.values() if len(s.steps)), default=-1)
