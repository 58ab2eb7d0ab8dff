"""Every run of the plan parses, and the program that makes them resumes one that was killed."""

import contextlib
import csv
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from make_tables import Results, make_tables
from plan import HERE, Run, read_plan
from recordings import settled_epochs

from nmlightning.cli import main

PLAN = read_plan()
FIRST = {run.name: run for run in reversed(PLAN.values())}.values()
TINY = """
tables:
  rotation:
    runs:
      whole: &run
        config: study_wd_on
        seeds: [1]
        options: [--data Digits --data.batch_size 32 --model.net.width 4 --trainer.max_epochs 8
          --trainer.precision 32-true --trainer.limit_train_batches 4 --trainer.limit_val_batches 1
          --trainer.log_every_n_steps 4]
      killed: *run
"""


@pytest.mark.parametrize("run", FIRST, ids=str)
def test_run_parses_against_its_config(run: Run) -> None:
    for words in run.stages:
        if words[0] != "nm":
            assert (HERE / words[0]).is_file()
            continue
        parsed = io.StringIO()
        place = words.index("--ckpt_path")
        with contextlib.redirect_stdout(parsed):
            assert main([*words[1:place], *words[place + 2 :], "--print_config"]) == 0
        config = yaml.safe_load(parsed.getvalue())
        assert config["seed_everything"] == run.seed
        callbacks = [each["class_path"] for each in config["trainer"]["callbacks"]]
        assert "nmlightning.WeightNormTracker" in callbacks


def test_no_two_runs_are_the_same() -> None:
    commands = [tuple(map(shlex.join, run.stages)) for run in PLAN.values()]
    assert len(set(commands)) == len(PLAN)
    assert len({str(run).lower() for run in PLAN.values()}) == len(PLAN)


def test_what_a_run_needs_comes_before_it() -> None:
    order = list(PLAN)
    for name, run in PLAN.items():
        assert all(order.index(need) < order.index(name) for need in run.needs)


def test_tables_share_runs_that_exist() -> None:
    tables = yaml.safe_load((HERE / "plan.yaml").read_text("utf-8"))["tables"]
    names = {run.name for run in PLAN.values()}
    assert all(set(table.get("shares", [])) <= names for table in tables.values())
    assert all(table["expected"] for table in tables.values())


@pytest.mark.slow  # three processes, each of which imports torch and Lightning
def test_a_killed_run_resumes_to_the_same_curves(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(TINY)
    options = ["--plan", tmp_path / "plan.yaml", "--results", tmp_path, "--data-root", tmp_path]
    options += ["--niceness", 0]
    command = [sys.executable, HERE / "run_plan.py", *map(str, options)]
    first = subprocess.Popen([*command, "--only", "killed"], start_new_session=True)
    checkpoint = tmp_path / "runs/killed-1/runs/study_wd_on/version_0/checkpoints/last.ckpt"
    while not checkpoint.exists():
        assert first.poll() is None, (tmp_path / "runs/killed-1/log.txt").read_text()
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "rotation").exists(), "it was too fast to be killed"
    assert subprocess.run(command).returncode == 0
    kept = {file.name: file.read_text() for file in (tmp_path / "rotation").iterdir()}
    assert kept["killed-1.csv"] == kept["whole-1.csv"]
    assert json.loads(kept["whole-1.json"])["resumed"] == 0
    assert json.loads(kept["killed-1.json"])["resumed"] == 1
    recorded = [tmp_path / f"recordings/{name}-1.csv" for name in ("killed", "whole")]
    assert recorded[0].read_text() == recorded[1].read_text()
    assert str(tmp_path) not in kept["killed-1.json"]
    for file in (tmp_path / "rotation").iterdir():
        file.unlink()
    assert subprocess.run([*command, "--keep"]).returncode == 0
    assert {file.name: file.read_text() for file in (tmp_path / "rotation").iterdir()} == kept
    rows = list(csv.DictReader(io.StringIO(kept["whole-1.csv"])))
    assert [int(row["epoch"]) for row in rows] == list(range(8))
    assert all(float(row[name]) > 0 for row in rows for name in ("effective_lr", "lr", "norm_min"))


def test_tables_are_made_of_what_is_kept(tmp_path: Path) -> None:
    (tmp_path / "docs/pictures").mkdir(parents=True)
    shutil.copy(HERE.parent / "README.md", tmp_path)
    make_tables(HERE, tmp_path)
    made = {file.relative_to(tmp_path): file for file in tmp_path.rglob("*") if file.is_file()}
    assert Path("docs/results.md") in made
    for name, file in made.items():
        assert file.read_bytes() == (HERE.parent / name).read_bytes(), f"make tables: {name}"
        assert file.stat().st_size < 100_000
    assert Path("docs/recordings.md") in made
    there = {file.name for file in (HERE.parent / "docs/pictures").glob("re*_*.svg")}
    assert there == {name.name for name in made if name.suffix == ".svg"}


def test_layer_is_settled_from_where_its_ratio_stays_near_1() -> None:
    ratios = np.full((8, 3), 1.05)
    ratios[2, 0] = 2.0  # which the mean of three epochs sees until the fourth
    ratios[7, 1] = 2.0
    assert settled_epochs(ratios) == ["5", "not reached", "2"]


def test_every_run_has_a_row() -> None:
    tables = yaml.safe_load((HERE / "page.yaml").read_text("utf-8"))["tables"]
    planned = yaml.safe_load((HERE / "plan.yaml").read_text("utf-8"))["tables"]
    assert tables.keys() == planned.keys()
    for name, table in planned.items():
        assert {*table["runs"], *table.get("shares", [])} == tables[name]["rows"].keys()


def test_cells_say_how_many_seeds_they_have(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(TINY.replace("seeds: [1]", "seeds: [1, 2]"))
    (tmp_path / "rotation").mkdir()
    column = {"metric": "val/top1", "first": -1}
    assert Results(tmp_path).cell("whole", column) == "not run yet"
    for seed, cell in ((1, "50.00 % (1 of 2)"), (2, "55.00 ± 7.07 % (2)")):
        (tmp_path / f"rotation/whole-{seed}.json").write_text("{}")
        rows = f"step,epoch,val/top1\n9,0,0.1\n19,1,{0.4 + seed / 10}\n"
        (tmp_path / f"rotation/whole-{seed}.csv").write_text(rows)
        assert Results(tmp_path).cell("whole", column) == cell
    assert Results(tmp_path).missing == 2
