"""Runs that go on with a run which was stopped: together they are one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from nmlightning.reports.run import Run
from nmlightning.reports.series import Series


def join_resumed(runs: Sequence[Run]) -> list[Run]:
    """Return the runs, each with what was logged before it in the run that it goes on with.

    A run goes on with another of its settings and seed if its config names a checkpoint of that
    one, or if their recordings are of one run. The other is then left out, unless it got as
    far itself.
    """
    before = {run.folder: _predecessor(run, runs) for run in runs}
    chains = [_chain(run, before) for run in runs]
    left_behind = {
        earlier.folder
        for *others, run in chains
        for earlier in others
        if _last_step(earlier) < _last_step(run)
    }
    return [_join(chain) for chain in chains if chain[-1].folder not in left_behind]


def _predecessor(run: Run, runs: Sequence[Run]) -> Run | None:
    """Return the run that this one goes on with; the latest one where several could be."""
    alike = [r for r in runs if r is not run and (r.settings, r.seed) == (run.settings, run.seed)]
    by_checkpoint = [r for r in alike if _holds_checkpoint_of(r, run)]
    by_recording = [r for r in alike if _is_recorded_by(r, run)]
    return max(by_checkpoint or by_recording, key=_first_step, default=None)


def _holds_checkpoint_of(earlier: Run, run: Run) -> bool:
    """Whether the checkpoint is in the earlier run's folder, wherever that was then."""
    place = earlier.folder.resolve().parts[-2:]
    return run.checkpoint is not None and any(
        parent.parts[-2:] == place for parent in run.checkpoint.parents
    )


def _is_recorded_by(earlier: Run, run: Run) -> bool:
    if earlier.norms is None or run.norms is None:
        return False
    name = run.norms.provenance.get("run")
    same = name is not None and name == earlier.norms.provenance.get("run")
    return same and _first_step(earlier) < _first_step(run)


def _chain(run: Run, before: Mapping[Path, Run | None]) -> list[Run]:
    """Return a run after all those that it goes on with."""
    chain = [run]
    while (earlier := before[chain[0].folder]) is not None and earlier not in chain:
        chain.insert(0, earlier)
    return chain


def _join(chain: Sequence[Run]) -> Run:
    joined = chain[0]
    for later in chain[1:]:
        start = _first_step(later)
        old = {tag: _until(series, start) for tag, series in joined.scalars.items()}
        joined = replace(
            later,
            scalars=_append(old, later.scalars),
            seconds=joined.seconds + later.seconds,
            norms=later.norms or joined.norms,
            parts=(*joined.parts, later.folder),
        )
    return joined


def _append(old: Mapping[str, Series], new: Mapping[str, Series]) -> dict[str, Series]:
    both = {
        tag: Series(
            np.append(series.steps, new[tag].steps), np.append(series.values, new[tag].values)
        )
        if tag in new
        else series
        for tag, series in old.items()
    }
    return {**both, **{tag: series for tag, series in new.items() if tag not in old}}


def _until(series: Series, step: float) -> Series:
    kept = series.steps < step
    return Series(series.steps[kept], series.values[kept])


def _first_step(run: Run) -> float:
    return min((float(s.steps[0]) for s in run.scalars.values() if len(s.steps)), default=np.inf)


def _last_step(run: Run) -> float:
    return max((float(s.steps[-1]) for s in run.scalars.values() if len(s.steps)), default=-1)
