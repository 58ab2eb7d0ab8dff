"""Every run of the plan parses, and the program that makes them resumes one that was killed."""

import contextlib
import csv
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from plan import HERE, Run, read_plan

from nmlightning.cli import main

PLAN = read_plan()
FIRST = {run.name: run for run in reversed(PLAN.values())}.values()
TINY = """
tables:
  tiny:
    runs:
      whole: &run
        config: study_wd_on
        seeds: [1]
        options: [--data Digits --data.batch_size 32 --model.net.width 4 --trainer.max_epochs 12
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


def test_a_killed_run_resumes_to_the_same_curves(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(TINY)
    options = ["--plan", tmp_path / "plan.yaml", "--results", tmp_path, "--data-root", tmp_path]
    command = [sys.executable, HERE / "run_plan.py", *map(str, options)]
    first = subprocess.Popen([*command, "--only", "killed"], start_new_session=True)
    checkpoint = tmp_path / "runs/killed-1/runs/study_wd_on/version_0/checkpoints/last.ckpt"
    while not checkpoint.exists():
        assert first.poll() is None, (tmp_path / "runs/killed-1/log.txt").read_text()
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "tiny").exists(), "it was too fast to be killed"
    assert subprocess.run(command).returncode == 0
    kept = {file.name: file.read_text() for file in (tmp_path / "tiny").iterdir()}
    assert kept["killed-1.csv"] == kept["whole-1.csv"]
    assert json.loads(kept["whole-1.json"])["resumed"] == 0
    assert json.loads(kept["killed-1.json"])["resumed"] == 1
    assert str(tmp_path) not in kept["killed-1.json"]
    rows = list(csv.DictReader(io.StringIO(kept["whole-1.csv"])))
    assert [int(row["epoch"]) for row in rows] == list(range(12))
    assert all(float(row[name]) > 0 for row in rows for name in ("effective_lr", "lr", "norm_min"))
