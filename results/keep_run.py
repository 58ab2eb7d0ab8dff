"""Keeps what a run gave: its curves as CSV, and how it was made and what it ended with as JSON."""

import csv
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from plan import Run

from nmlightning.reports import tags
from nmlightning.reports.comparison import join_resumed
from nmlightning.reports.run import Run as Logged
from nmlightning.reports.run import Series, find_runs, read_run
from nmlightning.weights.history import NormHistory

LAST_EPOCHS = 10  # are averaged, as the paper's figures are
PACKAGES = ("nmlightning", "torch", "pytorch-lightning")
RECORDED = ("weight_decay", "literal_rule", "norms", "rotation")  # tables of docs/recordings.md
_METRICS = re.compile(r"(train|val)/")


def keep_run(run: Run, folder: Path, kept: Path, attempts: list[dict[str, Any]]) -> None:
    """Write `kept` and, beside it, its CSV.

    Args:
        run: of the plan.
        folder: of the run, finished.
        kept: the JSON.
        attempts: the commit and the CPU time of each, where they are known.
    """
    logged = [read_run(version) for version in find_runs([folder / "runs"])]
    tests = {
        tag: float(f"{series.values[-1]:.6g}")
        for part in logged
        for tag, series in part.scalars.items()
        if tag.startswith("test/")
    }
    settings = logged[-1].settings  # which differ where the runner's own options changed meanwhile
    same = [replace(part, settings=settings) for part in logged]
    joined = max(join_resumed(same), key=count_rows)
    rows = list(make_rows(joined))
    write_rows(kept.with_suffix(".csv"), rows)
    if run.table in RECORDED and joined.norms is not None:
        write_rows(kept.parents[1] / "recordings" / f"{run}.csv", recording_rows(joined))
    content = describe(run, joined, rows, attempts)
    content["final"] |= tests
    kept.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    first, *others = rows
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, first, lineterminator="\n")
        writer.writeheader()
        writer.writerows([first, *others])


def count_rows(run: Logged) -> int:
    return len(run.scalars["val/loss"].steps) if "val/loss" in run.scalars else 0


def make_rows(run: Logged) -> Iterable[dict[str, Any]]:
    """Yield step, epoch, metrics, rates and norms of each validation, to six digits.

    A metric that was not logged then has the value it had last, since the validation before.
    """
    scalars = run.scalars
    norms = None if run.norms is None else run.norms.epoch_ends()
    before = -1
    for step in scalars["val/loss"].steps:
        epoch = int(run.epochs_at(np.array([step]))[0])
        metrics = {
            tag: last_value(series, step, before)
            for tag, series in scalars.items()
            if _METRICS.match(tag)
        }
        before = step
        row = {**metrics, "effective_lr": effective_lr(scalars, step), **norm_summary(norms, epoch)}
        yield {"step": step, "epoch": epoch - 1, **{k: f"{v:.6g}" for k, v in row.items()}}


def last_value(series: Series, step: int, after: int = -1) -> float:
    """Return the value at a step, or else the last before it and after another; or else NaN."""
    values = series.values[(series.steps > after) & (series.steps <= step)]
    return float(values[-1]) if len(values) else np.nan


def effective_lr(scalars: Mapping[str, Series], step: int) -> float:
    """Return the median over layers of η · factor / ((1 − m) ‖w_i‖^q), as it was logged last.

    The factor is what a rule multiplied the steps of a layer by, in the mean over its channels.
    """
    prefix = tags.EFFECTIVE_LR
    rates = []
    for tag in (tag for tag in scalars if tag.startswith(prefix)):
        factor = scalars.get(tags.factor_tag(tag.removeprefix(prefix), "mean"))
        rate = last_value(scalars[tag], step)
        rates.append(rate if factor is None else rate * last_value(factor, step))
    return float(np.nanmedian(rates)) if np.isfinite(rates).any() else np.nan


def norm_summary(norms: NormHistory | None, epoch: int) -> dict[str, float]:
    """Return the learning rate, and the least, mean and greatest norm ‖W‖ of a layer."""
    if norms is None:
        return {}
    (record,) = np.flatnonzero(norms.epochs == epoch - 1)
    layers = [name for name in norms.norms if not name.endswith("_v")]
    values = [float(np.linalg.norm(norms.norms[name][record])) for name in layers]
    summary = {"norm_min": min(values), "norm_mean": fmean(values), "norm_max": max(values)}
    return {"lr": float(np.nanmax(norms.learning_rates[record])), **summary}


def recording_rows(run: Logged) -> Iterable[dict[str, Any]]:
    """Yield what was recorded and logged of each layer in each epoch, to five digits.

    Norms are those of its channels at the end of the epoch, `shrunk` is the most that one of them
    fell since the start, as a factor. The rotation is the root mean square over the logged steps.
    """
    assert run.norms is not None
    ends = run.norms.epoch_ends()
    for place, epoch in enumerate(ends.epochs):
        for number, (name, norms) in enumerate(ends.norms.items()):
            layer = tags.layer_of(name)
            logged = {
                tag: values_of_epoch(run.scalars.get(tag), ends.steps, place)
                for tag in [tags.EFFECTIVE_LR + layer, tags.ROTATION + layer]
                + [tags.EQUILIBRIUM + layer]
                + [tags.factor_tag(layer, name) for name in ("min", "mean", "max")]
            }
            rate, angles, expected, least, mean, most = logged.values()
            row = {
                "lr": ends.learning_rates[place, number],
                "norm_min": norms[place].min(),
                "norm": np.median(norms[place]),
                "norm_max": norms[place].max(),
                "shrunk": np.max(run.norms.norms[name][0] / norms[place]),
                "effective_lr": rate[-1:].sum() * (mean[-1] if len(mean) else 1) or np.nan,
                "rotation": np.sqrt(np.mean(np.square(angles))) if len(angles) else np.nan,
                "equilibrium": expected.mean() if len(expected) else np.nan,
                "factor_min": least.min(initial=np.inf) if len(least) else np.nan,
                "factor_max": most.max(initial=0) if len(most) else np.nan,
            }
            clock = {"step": ends.steps[place], "epoch": epoch}
            values = {key: f"{value:.5g}" for key, value in row.items()}
            yield {**clock, "layer": layer, "logged_steps": len(angles), **values}


def values_of_epoch(series: Series | None, ends: NDArray[np.int64], place: int) -> NDArray[Any]:
    """Return what was logged before this end of an epoch and not before the one before it."""
    if series is None:
        return np.empty(0)
    return series.values[np.searchsorted(ends, series.steps, side="right") == place]


def describe(
    run: Run, logged: Logged, rows: list[dict[str, Any]], attempts: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return how a run was made and what it ended with, as plain data."""
    late = rows[-LAST_EPOCHS:] if len(rows) >= LAST_EPOCHS else []
    metrics = [name for name in rows[-1] if _METRICS.match(name)]
    return {
        "run": run.name,
        "seed": run.seed,
        "commands": [shlex.join(stage) for stage in run.stages],
        "commit": ", ".join(dict.fromkeys(attempt["commit"] for attempt in attempts)),
        "versions": {name: version(name) for name in PACKAGES},
        "device": device(),
        "threads": 1,
        "precision": logged.settings.get("trainer.precision", "bf16-mixed"),
        "cpu_minutes": round(sum(attempt["cpu_seconds"] for attempt in attempts) / 60, 1),
        "resumed": len(logged.parts) - 1,
        "exit_code": attempts[-1]["code"] if attempts else 0,
        "final": {name: float(rows[-1][name]) for name in metrics if rows[-1][name] != "nan"},
        f"mean_of_last_{LAST_EPOCHS}": {
            name: float(f"{fmean(float(row[name]) for row in late):.6g}")
            for name in metrics
            if late
        },
        "settings": {"config": run.settings.get("config") or what_script(run), **logged.settings},
    }


def what_script(run: Run) -> str:
    return " ".join([run.settings["script"], *run.settings["options"]])


def device() -> str:
    """Return the model of the CPU, as Linux says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"CPU, {next(models, 'unknown')}"
