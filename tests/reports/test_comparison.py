import math
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from nmlightning.errors import InputError
from nmlightning.reports.comparison import (
    Group,
    choose_metric,
    differing_settings,
    group_runs,
    is_loss,
)
from nmlightning.reports.page import result_columns, setting_rows
from nmlightning.reports.run import read_run

MakeRun = Callable[..., Path]


def compare(*folders: Path) -> list[Group]:
    return group_runs([read_run(folder) for folder in folders], "val/top1")


def test_a_group_is_of_one_setting(make_run: MakeRun) -> None:
    folders = [
        make_run(f"{name}/version_{seed}", config={"seed_everything": seed, "lr": lr})
        for name, lr in (("high", 0.1), ("low", 0.01))
        for seed in (2, 1)
    ]
    high, low = compare(*folders)
    assert [high.name, low.name] == ["high", "low"]
    assert high.seeds == "1, 2"
    assert differing_settings([high, low]) == {"lr": "lr"}


def test_runs_without_a_config_stay_alone(make_run: MakeRun) -> None:
    groups = compare(make_run("a/version_0"), make_run("a/version_1"))
    assert [group.seeds for group in groups] == ["1 run", "1 run"]


def test_figures(make_run: MakeRun) -> None:
    accuracies = [[0.1] * 5 + [0.5] * 9 + [0.4], [0.1] * 5 + [0.6] * 9 + [0.6]]
    (group,) = compare(
        *(
            make_run(str(n), a, config={"seed_everything": n, "lr": 1})
            for n, a in enumerate(accuracies)
        )
    )
    assert group.final.mean == pytest.approx(0.5)
    assert group.final.deviation == pytest.approx(statistics.stdev([0.4, 0.6]))
    assert group.best.mean == pytest.approx(0.55)
    assert group.late.mean == pytest.approx((0.49 + 0.6) / 2)
    assert group.epochs == "15"
    assert result_columns([group]) == {
        "final": ["50.00 ± 14.14 %"],
        "best": ["55.00 ± 7.07 %"],
        "mean of last 10": ["54.50 ± 7.78 %"],
        "time": ["7 min 0 s"],
    }


def test_the_best_loss_is_the_smallest(make_run: MakeRun) -> None:
    folder = make_run(scalars={"val/loss": [2.0, 1.0, math.nan, 1.5]})
    group = Group("a", [read_run(folder)], "val/loss")
    assert group.best.mean == 1.0
    assert math.isnan(group.best.deviation)
    columns = result_columns([group])
    assert (columns["final"], columns["best"]) == (["1.5000"], ["1.0000"])


def test_fewer_than_ten_epochs_have_no_mean_of_the_last_ten(make_run: MakeRun) -> None:
    short, long = (Group("a", [read_run(make_run(str(n), [0.5] * n))], "val/top1") for n in (9, 10))
    assert short.late is None
    assert result_columns([short, long])["mean of last 10"] == ["—", "50.00 %"]
    assert list(result_columns([short])) == ["final", "best", "time"]


@pytest.mark.parametrize(
    ("metric", "loss"), [("val/loss", True), ("val/ppl", True), ("val/top1", False), ("F1", False)]
)
def test_is_loss(metric: str, loss: bool) -> None:
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
def test_choose_metric(tags: list[str], chosen: str, make_run: MakeRun) -> None:
    folder = make_run(accuracy=[], scalars={tag: [1.0] for tag in tags})
    assert choose_metric([read_run(folder)]) == chosen


def test_a_metric_that_is_not_there(make_run: MakeRun) -> None:
    runs = [
        read_run(make_run("a", scalars={"val/loss": [1.0]})),
        read_run(make_run("b", accuracy=[], scalars={"val/loss": [1.0]})),
    ]
    assert choose_metric(runs) == "val/loss"
    assert choose_metric(runs[:1], "epoch") == "epoch"
    with pytest.raises(
        InputError, match=r"b has logged no 'val/top1'.* In common they have val/lo"
    ):
        choose_metric(runs, "val/top1")
    other = read_run(make_run("c", accuracy=[], scalars={"x": [1.0]}))
    message = r"no validation metric in common; choose another by --metric. They have nothing in"
    with pytest.raises(InputError, match=message):
        choose_metric([*runs, other])


def test_what_a_class_explains_does_not_differ(make_run: MakeRun) -> None:
    def config(name: str, **arguments: object) -> dict[str, object]:
        return {"rule": {"class_path": f"nm.{name}", "init_args": arguments}, "optimizer.lr": 0.1}

    configs = [
        config("A", bound=1, mode="x"),
        config("A", bound=1, mode="y"),
        config("B", bound=1, speed=3),
        {"optimizer.lr": 0.2, "scheduler.lr": 0.3},
    ]
    groups = compare(*(make_run(str(n), config=c) for n, c in enumerate(configs)))
    assert differing_settings(groups) == {
        "rule": "rule",
        "rule.mode": "mode",
        "optimizer.lr": "optimizer.lr",
        "scheduler.lr": "scheduler.lr",
    }
    assert setting_rows(groups)[1] == ["1", "1 run", "2", "optimizer.lr: 0.1\nrule: A\nmode: y"]
