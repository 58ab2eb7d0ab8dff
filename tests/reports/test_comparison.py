import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nmlightning.errors import InputError
from nmlightning.reports.comparison import (
    Group,
    choose_metric,
    differing_settings,
    group_runs,
    is_loss,
    join_resumed,
    result_columns,
    setting_rows,
)
from nmlightning.reports.formatting import format_value
from nmlightning.reports.run import Run, read_run
from nmlightning.weights.history import NormHistory
from nmlightning.weights.recording_file import FILE_NAME

MakeRun = Callable[..., Path]
CONFIG = {"seed_everything": 1, "lr": 0.1}


def compare(*folders: Path) -> list[Group]:
    return group_runs([read_run(folder) for folder in folders], "val/top1")


def test_group_runs_has_a_group_a_setting(make_run: MakeRun) -> None:
    folders = [
        make_run(f"{name}/version_{seed}", config={"seed_everything": seed, "lr": lr})
        for name, lr in (("high", 0.1), ("low", 0.01))
        for seed in (2, 1)
    ]
    high, low = compare(*folders)
    assert [high.name, low.name] == ["high", "low"]
    assert high.seeds == "1, 2"
    assert differing_settings([high, low]) == {"lr": "lr"}


def test_group_runs_leaves_runs_without_a_config_alone(make_run: MakeRun) -> None:
    groups = compare(make_run("a/version_0"), make_run("a/version_1"))
    assert [group.seeds for group in groups] == ["1 run", "1 run"]


def test_group_final_best_and_late_are_over_its_runs(make_run: MakeRun) -> None:
    accuracies = [[0.1] * 5 + [0.5] * 9 + [0.4], [0.1] * 5 + [0.6] * 9 + [0.6]]
    (group,) = compare(
        *(
            make_run(str(n), a, config={"seed_everything": n, "lr": 1})
            for n, a in enumerate(accuracies)
        )
    )
    assert group.final.mean == pytest.approx(0.5)
    assert group.final.std == pytest.approx(statistics.stdev([0.4, 0.6]))
    assert group.best.mean == pytest.approx(0.55)
    assert group.late.mean == pytest.approx((0.49 + 0.6) / 2)
    assert group.epochs == "15"
    assert str(group) == "0, 1 (seeds 0, 1): val/top1 50.00 ± 14.14 %, at best 55.00 ± 7.07 %"
    assert result_columns([group]) == {
        "final": ["50.00 ± 14.14 %"],
        "best": ["55.00 ± 7.07 %"],
        "mean of last 10": ["54.50 ± 7.78 %"],
        "time": ["7 min 0 s"],
    }


def test_group_best_of_a_loss_is_the_smallest(make_run: MakeRun) -> None:
    folder = make_run(scalars={"val/loss": [2.0, 1.0, math.nan, 1.5]})
    group = Group("a", [read_run(folder)], "val/loss")
    assert group.best.mean == 1.0
    assert math.isnan(group.best.std)
    columns = result_columns([group])
    assert (columns["final"], columns["best"]) == (["1.5000"], ["1.0000"])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("ends", "final", "best"),
    [
        ([math.inf, 1.0], "inf (1 of 2 runs)", "1.0000 ± 0.0000"),
        ([math.nan, math.nan], "nan (2 of 2 runs)", "1.0000 ± 0.0000"),
        ([math.nan], "nan", "1.0000"),
        ([math.inf, -math.inf], "nan (2 of 2 runs)", "-inf (1 of 2 runs)"),
    ],
)
def test_results_show_runs_that_diverge(
    ends: list[float], final: str, best: str, make_run: MakeRun
) -> None:
    runs = [
        read_run(make_run(str(n), scalars={"val/loss": [1.0, x], "x/loss": [math.nan]}))
        for n, x in enumerate(ends)
    ]
    columns = result_columns([Group("a", runs, "val/loss")])
    assert (columns["final"], columns["best"]) == ([final], [best])
    assert result_columns([Group("a", runs, "x/loss")])["best"][0].startswith("nan")


def test_group_late_needs_ten_epochs(make_run: MakeRun) -> None:
    short, long = (Group("a", [read_run(make_run(str(n), [0.5] * n))], "val/top1") for n in (9, 10))
    assert short.late is None
    assert result_columns([short, long])["mean of last 10"] == ["—", "50.00 %"]
    assert list(result_columns([short])) == ["final", "best", "time"]


@pytest.mark.parametrize(
    ("value", "metric", "text"),
    [
        (0.9307, "val/top1", "93.07 %"),
        (0.27134, "val/loss", "0.2713"),
        (-0.5, "val/loss", "-0.5000"),
        (27.314, "val/bleu", "27.31"),
        (5.1, "val/ppl", "5.1000"),
        (0.0, "val/bleu", "0.00"),
        (12345.678, "train/tokens_per_s", "12,346"),
        (float("nan"), "val/loss", "nan"),
    ],
)
def test_format_value_has_the_decimals_of_its_size(value: float, metric: str, text: str) -> None:
    assert format_value(value, metric) == text


@pytest.mark.parametrize(
    ("metric", "loss"), [("val/loss", True), ("val/ppl", True), ("val/top1", False), ("F1", False)]
)
def test_is_loss_goes_by_the_name(metric: str, loss: bool) -> None:
    assert is_loss(metric) is loss


@pytest.mark.parametrize(
    ("tags", "chosen"),
    [
        (["train/acc", "val/loss", "val/top5", "val/top1"], "val/top1"),
        (["val_loss", "val_acc"], "val_acc"),
        (["val_loss", "val_bleu"], "val_bleu"),
        (["lr", "val_bleu"], "val_bleu"),
    ],
)
def test_choose_metric_prefers_accuracy_then_bleu_in_validation(
    tags: list[str], chosen: str, make_run: MakeRun
) -> None:
    folder = make_run(accuracy=[], scalars={tag: [1.0] for tag in tags})
    assert choose_metric([read_run(folder)]) == chosen


def test_choose_metric_refuses_what_a_run_lacks(make_run: MakeRun) -> None:
    runs = [
        read_run(make_run("a", scalars={"val/loss": [1.0]})),
        read_run(make_run("b", accuracy=[], scalars={"val/loss": [1.0]})),
    ]
    assert choose_metric(runs) == "val/loss"
    assert choose_metric(runs[:1], "epoch") == "epoch"
    with pytest.raises(InputError, match=r"b has logged no 'val/top1'.* In common they have"):
        choose_metric(runs, "val/top1")
    with pytest.raises(InputError, match="d has no metrics yet"):
        choose_metric([read_run(make_run("d", []))])
    other = read_run(make_run("c", accuracy=[], scalars={"x": [1.0]}))
    message = r"no metric of validation or training in common; .* by --metric. They have nothing in"
    with pytest.raises(InputError, match=message):
        choose_metric([*runs, other])


def test_differing_settings_leaves_out_arguments_of_a_differing_class(make_run: MakeRun) -> None:
    def config(name: str, **arguments: object) -> dict[str, object]:
        return {"rule": {"class_path": f"nm.{name}", "init_args": arguments}, "optimizer.lr": 0.1}

    configs = [
        config("A", bound=1, mode="x"),
        config("A", bound=1, mode="y"),
        config("B", bound=1, speed=3),
        {"optimizer.lr": 0.2, "scheduler.lr": 0.3},
    ]
    groups = compare(*(make_run(str(n), config=c) for n, c in enumerate(configs)))
    twice = compare(*(make_run(f"{n}/one", config=c) for n, c in enumerate(configs[:2])))
    assert [group.name for group in twice] == ["one (1)", "one (2)"]
    assert differing_settings(groups) == {
        "rule": "rule",
        "rule.mode": "mode",
        "optimizer.lr": "optimizer.lr",
        "scheduler.lr": "scheduler.lr",
    }
    assert setting_rows(groups)[1] == ["1", "1 run", "2", "optimizer.lr: 0.1\nrule: A\nmode: y"]


def resume(folder: Path) -> dict[str, object]:
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


def test_join_resumed_makes_one_run_of_a_chain(make_run: MakeRun) -> None:
    first = make_run("a/version_0", [0.1, 0.2, 0.3], CONFIG)
    second = make_run("a/version_1", [0.25, 0.4], resume(first), first_epoch=1)
    third = make_run("a/version_2", [0.5], resume(second), first_epoch=3)
    runs = join(first, second, third)
    assert [run.folder for run in runs] == [third]
    assert values(runs[0]) == pytest.approx({9: 0.1, 19: 0.25, 29: 0.4, 39: 0.5})
    assert runs[0].seconds == 60 + 30 + 0
    assert runs[0].parts == (first, second, third)
    assert group_runs(runs, "val/top1")[0].seeds == "1"


def test_join_resumed_takes_a_run_without_the_metric(make_run: MakeRun) -> None:
    first = make_run("a/version_0", [], CONFIG, scalars={"train/loss": [2.0]})
    second = make_run("a/version_1", [0.5], resume(first))
    (run,) = join(first, second)
    assert values(run) == {9: 0.5}
    assert list(run.scalars["train/loss"].values) == [2.0]


def test_join_resumed_goes_by_recordings_of_one_run(make_run: MakeRun) -> None:
    first = write_recording(make_run("a/version_0", [0.1, 0.2], {"lr": 1}), "x")
    second = write_recording(make_run("a/version_1", [0.3], {"lr": 1}, first_epoch=2), "x")
    other = write_recording(make_run("a/version_2", [0.4], {"lr": 1}), "y")
    runs = join(first, second, other)
    assert [run.parts for run in runs] == [(first, second), (other,)]


@pytest.mark.parametrize(
    ("resumed", "other"), [("version_1", "version_10"), ("version_10", "version_1")]
)
def test_join_resumed_finds_a_checkpoint_by_the_folders_whole_name(
    resumed: str, other: str, make_run: MakeRun
) -> None:
    decoy, first = (make_run(f"a/{name}", [0.1], CONFIG) for name in (other, resumed))
    second = make_run("a/version_2", [0.3], resume(Path("/gone/a", resumed)), first_epoch=1)
    assert [run.parts for run in join(decoy, first, second)] == [(decoy,), (first, second)]


@pytest.mark.parametrize("exists", [True, False])
def test_join_resumed_takes_the_checkpoint_of_the_longest_common_path(
    exists: bool, make_run: MakeRun
) -> None:
    other, first = make_run("A/q/version_0", [0.5] * 3, CONFIG), make_run("B/q/version_0", [0.1])
    config = {**CONFIG, "ckpt_path": f"/gone{first}/checkpoints/last.ckpt"}
    if exists:
        (first / "checkpoints").mkdir()
        (first / "checkpoints" / "last.ckpt").touch()
        config = resume(first)
    (first / "config.yaml").write_bytes((other / "config.yaml").read_bytes())
    second = make_run("B/q/version_1", [0.3], config, first_epoch=1)
    assert [run.parts for run in join(other, first, second)] == [(other,), (first, second)]
    assert len(join(other, second)) == (2 if exists else 1)


@pytest.mark.parametrize("csv", [False, True])
def test_join_resumed_knows_a_copy_though_the_checkpoint_exists(
    csv: bool, make_run: MakeRun, tmp_path: Path
) -> None:
    first = make_run("a/q/version_0", [0.1], CONFIG)
    make_run("a/q/version_1", [0.3], resume(first), first_epoch=1)
    (first / "checkpoints").mkdir()
    (first / "checkpoints" / "last.ckpt").touch()
    for file in (tmp_path / "a").rglob("events*") if csv else ():
        file.with_name("metrics.csv").write_text(f"step,x\n{9 + (first != file.parent)},1\n")
        file.unlink()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert len(join(*sorted((tmp_path / "b" / "q").iterdir()))) == 1


@pytest.mark.parametrize("cwd", [".", "a", "b"])
def test_join_resumed_finds_a_relative_checkpoint_from_the_runs_project(
    cwd: str, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for project in "ab":
        first = make_run(f"{project}/runs/q/version_0", [0.1], CONFIG)
        (first / "checkpoints").mkdir()
        (first / "checkpoints" / "last.ckpt").touch()
        config = resume(Path("runs/q/version_0"))
        second = make_run(f"{project}/runs/q/version_1", [0.3], config, first_epoch=1)
    monkeypatch.chdir(tmp_path / cwd)
    assert [run.parts for run in join(first, second)] == [(first, second)]
    assert len(join(*sorted(tmp_path.glob("*/runs/q/*")))) == 2


@pytest.mark.parametrize("changes", [{"lr": 0.2}, {"seed_everything": 2}])
def test_join_resumed_keeps_other_settings(changes: dict[str, object], make_run: MakeRun) -> None:
    first = make_run("a/version_0", [0.1], CONFIG)
    second = make_run("a/version_1", [0.3], {**resume(first), **changes}, first_epoch=1)
    assert len(join(first, second)) == 2


@pytest.mark.parametrize(
    ("first", "start", "second", "joined"),
    [
        ([0.1, 0.2, 0.3], 3, [], [0.1, 0.2, 0.3]),  # there was nothing left to do
        ([0.1, 0.2, 0.3], 1, [0.2, 0.3], [0.1, 0.2, 0.3]),
        ([0.1, 0.2, 0.3], 1, [0.2], [0.1, 0.2, 0.3]),  # was killed
        ([0.1, 0.2], 2, [0.3, 0.4], [0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_join_resumed_makes_a_run_and_its_resume_one(
    first: list[float], start: int, second: list[float], joined: list[float], make_run: MakeRun
) -> None:
    length = {"trainer": {"max_epochs": 3, "log_every_n_steps": 50}}
    begun = make_run("a/version_0", first, CONFIG | length)
    ours = resume(begun) | {"trainer": {"max_epochs": 4, "log_every_n_steps": 5}}
    other = make_run("a/version_1", second, ours, first_epoch=start)
    (run,) = join(begun, other)
    assert list(values(run).values()) == pytest.approx(joined)
    assert set(run.parts) == {begun, other}


def test_join_resumed_goes_by_steps_for_a_checkpoint_kept_elsewhere(make_run: MakeRun) -> None:
    first = make_run("a/version_0", [0.1, 0.2], CONFIG)
    config = {**CONFIG, "ckpt_path": "kept/last.ckpt"}
    second = make_run("a/version_1", [0.3], config, first_epoch=1)
    assert [run.parts for run in join(first, second)] == [(first, second)]


def test_group_seeds_show_repeats(make_run: MakeRun) -> None:
    folders = [
        make_run(f"a/version_{number}", config={**CONFIG, "seed_everything": seed})
        for number, seed in enumerate((2, 1, 1))
    ]
    runs = join(*folders)
    (group,) = group_runs(runs, "val/top1")
    assert group.seeds == "1 (2 runs), 2"
    assert group.repeats_seeds
    assert np.isclose(group.final.mean, 0.75)
