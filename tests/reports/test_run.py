import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nmlightning.errors import InputError
from nmlightning.reports.run import find_runs, flatten_settings, read_run, read_saved_config

CSV = """epoch,step,train/loss,val/top1
0,4,1.5,
0,9,,0.5
1,14,1.25,
1,19,,0.75
"""


def test_a_tensorboard_run(make_run: Callable[..., Path]) -> None:
    run = read_run(make_run(config={"seed_everything": 7, "a": {"b": 1}}, norms={"w": [[1], [2]]}))
    assert run.name == "experiment"
    assert run.seed == 7
    assert run.settings == {"a.b": 1}
    assert run.seconds == 30
    assert run.scalars["val/top1"].values.tolist() == [0.5, 0.75]
    assert run.epochs_at(run.scalars["val/top1"].steps).tolist() == [1, 2]
    assert run.norms is not None
    assert run.norms.norms["w"].tolist() == [[1], [2]]


def test_a_csv_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(CSV)
    run = read_run(tmp_path)
    assert run.name == tmp_path.name
    assert run.seed is None
    assert run.settings == {}
    assert run.norms is None
    assert math.isnan(run.seconds)
    assert run.scalars["val/top1"].steps.tolist() == [9, 19]
    assert run.epochs_at(run.scalars["val/top1"].steps).tolist() == [1, 2]


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "step,loss\n1,x\n", "step,loss\n,1\n"])
def test_a_csv_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(
        InputError, match=r"metrics.csv is damaged, or not of Lightning's CSVLogger"
    ):
        read_run(tmp_path)


def test_a_csv_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes(b"step,val/top1\n1,\xff\n")
    with pytest.raises(
        InputError, match=r"metrics.csv is damaged, or not of Lightning's CSVLogger"
    ):
        read_run(tmp_path)


def test_without_epochs_steps_are_shown(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,val/top1\n3,0.5\n")
    run = read_run(tmp_path)
    assert run.epochs_at(np.array([3])).tolist() == [3]


def test_of_two_files_the_later_one_counts(make_run: Callable[..., Path]) -> None:
    folder = make_run(accuracy=[0.5, 0.75])
    (first,) = folder.glob("events*")
    first.rename(folder / "events.out.tfevents.0")
    make_run(accuracy=[0.25])
    assert read_run(folder).scalars["val/top1"].values.tolist() == [0.25, 0.75]


def test_find_runs(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folders = [make_run(f"runs/a/version_{number}") for number in (10, 9)] + [make_run("runs/b")]
    found = find_runs([tmp_path / "runs" / "b", tmp_path / "runs"])
    assert found == [folders[2], folders[1], folders[0]]


def test_find_no_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no folder '.*nowhere' in"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="holds no run: there is neither an event file"):
        find_runs([tmp_path])


def test_flatten_settings() -> None:
    steering = {"class_path": "nm.LRCorrection", "init_args": {"reference": "x", "mode": "paper"}}
    swap = {"class_path": "nm.NormSwap"}
    tracker = {"class_path": "nm.WeightNormTracker", "init_args": {"steering": steering}}
    config = {
        "seed_everything": 1,
        "trainer": {
            "logger": {"class_path": "a.B"},
            "callbacks": [tracker, swap],
            "max_time": None,
        },
        "data": {"class_path": "nm.CIFAR10", "init_args": {"root": "here", "batch_size": 3}},
        "betas": [0.9, 0.99],
    }
    assert flatten_settings(config) == {
        "trainer.callbacks.WeightNormTracker": "yes",
        "trainer.callbacks.WeightNormTracker.steering": "LRCorrection",
        "trainer.callbacks.WeightNormTracker.steering.mode": "paper",
        "trainer.callbacks.NormSwap": "yes",
        "data": "CIFAR10",
        "data.batch_size": 3,
        "betas": "[0.9, 0.99]",
    }


def test_hyperparameters_of_any_project(tmp_path: Path) -> None:
    text = "lr: 0.1\nmodel: !!python/object:a.Net\n  depth: 3\nkind: !!python/name:os.system ''\n"
    (tmp_path / "hparams.yaml").write_text(text)
    assert read_saved_config(tmp_path)["lr"] == 0.1
    assert read_saved_config(tmp_path)["kind"] == "tag:yaml.org,2002:python/name:os.system"


def test_a_config_that_is_no_yaml(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: [1\n")
    with pytest.raises(InputError, match=r"config.yaml is no YAML: "):
        read_saved_config(tmp_path)
