"""Test that a run and the one that goes on with it are one."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nmlightning.reports.comparison import group_runs, join_resumed
from nmlightning.reports.run import Run, read_run
from nmlightning.weights.history import NormHistory
from nmlightning.weights.recording_file import FILE_NAME

MakeRun = Callable[..., Path]
CONFIG = {"seed_everything": 1, "lr": 0.1}


def going_on(folder: Path) -> dict[str, object]:
    return {**CONFIG, "ckpt_path": str(folder / "checkpoints" / "last.ckpt")}


def write_recording(folder: Path, run: str) -> Path:
    history = NormHistory.from_arrays({"w": [[1.0]]}, [1], [0], provenance={"run": run})
    history.save(folder / FILE_NAME)
    return folder


def join(*folders: Path) -> list[Run]:
    return join_resumed([read_run(folder) for folder in folders])


def values(run: Run) -> dict[int, float]:
    series = run.scalars["val/top1"]
    return dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))


def test_a_killed_run_and_its_resumes(make_run: MakeRun) -> None:
    first = make_run("a/version_0", [0.1, 0.2, 0.3], CONFIG)
    second = make_run("a/version_1", [0.25, 0.4], going_on(first), first_epoch=1)
    third = make_run("a/version_2", [0.5], going_on(second), first_epoch=3)
    runs = join(first, second, third)
    assert [run.folder for run in runs] == [third]
    assert values(runs[0]) == pytest.approx({9: 0.1, 19: 0.25, 29: 0.4, 39: 0.5})
    assert runs[0].seconds == 60 + 30 + 0
    assert runs[0].parts == (first, second, third)
    assert group_runs(runs, "val/top1")[0].seeds == "1"


def test_a_run_that_logged_nothing_before_it_was_killed(make_run: MakeRun) -> None:
    first = make_run("a/version_0", [], CONFIG, scalars={"train/loss": [2.0]})
    second = make_run("a/version_1", [0.5], going_on(first))
    (run,) = join(first, second)
    assert values(run) == {9: 0.5}
    assert list(run.scalars["train/loss"].values) == [2.0]


def test_a_recording_tells_what_goes_on(make_run: MakeRun) -> None:
    first = write_recording(make_run("a/version_0", [0.1, 0.2], {"lr": 1}), "x")
    second = write_recording(make_run("a/version_1", [0.3], {"lr": 1}, first_epoch=2), "x")
    other = write_recording(make_run("a/version_2", [0.4], {"lr": 1}), "y")
    runs = join(first, second, other)
    assert [run.parts for run in runs] == [(first, second), (other,)]


def test_the_folder_may_be_elsewhere(make_run: MakeRun) -> None:
    first = make_run("a/version_0", [0.1], CONFIG)
    make_run("a/version_10", [0.9], CONFIG)
    moved = Path("/gone/a/version_0")
    second = make_run("a/version_1", [0.3], going_on(moved), first_epoch=1)
    assert [run.parts for run in join(first, second)] == [(first, second)]


@pytest.mark.parametrize("changes", [{"lr": 0.2}, {"seed_everything": 2}])
def test_a_run_of_another_setting_stays(changes: dict[str, object], make_run: MakeRun) -> None:
    first = make_run("a/version_0", [0.1], CONFIG)
    second = make_run("a/version_1", [0.3], {**going_on(first), **changes}, first_epoch=1)
    assert len(join(first, second)) == 2


def test_a_run_that_was_not_left_behind_stays(make_run: MakeRun) -> None:
    first = make_run("a/version_0", [0.1, 0.2, 0.3], CONFIG)
    second = make_run("a/version_1", [0.25, 0.4], going_on(first), first_epoch=1)
    runs = join(first, second)
    curves = [list(values(run).values()) for run in runs]
    assert curves == [pytest.approx([0.1, 0.2, 0.3]), pytest.approx([0.1, 0.25, 0.4])]


def test_repeated_seeds_are_shown(make_run: MakeRun) -> None:
    folders = [
        make_run(f"a/version_{number}", config={**CONFIG, "seed_everything": seed})
        for number, seed in enumerate((2, 1, 1))
    ]
    runs = join(*folders)
    (group,) = group_runs(runs, "val/top1")
    assert group.seeds == "1 (2 runs), 2"
    assert group.repeats_seeds
    assert np.isclose(group.final.mean, 0.75)
