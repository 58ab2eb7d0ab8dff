import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nmlightning.cli import main


@pytest.fixture(autouse=True)
def _in_the_folder_of_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that took the place of this process, none of which runs."""
    commands: list[list[str]] = []

    def replace_process(program: str, command: list[str], env: dict[str, str]) -> None:
        assert program == command[0]
        assert env["PYTHONSAFEPATH"]
        commands.append(command)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", replace_process)
    return commands


def start(*words: str) -> None:
    with pytest.raises(SystemExit):
        main(["dashboard", *words])


def test_dashboard_starts_tensorboard_on_a_folder(
    make_run: Callable[..., Path], started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    make_run("runs/a/version_0")
    start()
    program = [sys.executable, "-m", "tensorboard.main"]
    assert started == [[*program, "--logdir", "runs", "--port", "6006", "--host", "localhost"]]
    answer = capsys.readouterr()
    assert answer.out == "nm: the runs are at http://localhost:6006/\n"
    assert answer.err.startswith("nm: no run here has recorded norms")
    assert answer.err.endswith(" add WeightNormTracker to trainer.callbacks.\n")
    make_run("runs/b/version_0").joinpath("weight_norms.safetensors").touch()
    start()
    answer = capsys.readouterr()
    assert answer.out == "nm: weight norms are at http://localhost:6006/#custom_scalars\n"
    assert not answer.err


def test_dashboard_names_several_folders(
    make_run: Callable[..., Path], started: list[list[str]], tmp_path: Path
) -> None:
    make_run("runs/a/version_0")
    make_run("runs/b/version_0")
    start("runs/a/", "runs/b", "--port", "0")
    assert started[0][3:5] == ["--logdir_spec", "runs/a:runs/a/,runs/b:runs/b"]
    start(f"{tmp_path}/runs/a", "runs/b")  # TensorBoard takes /a:b for one path
    assert started[1][4] == f"{str(tmp_path)[1:]}/runs/a:{tmp_path}/runs/a,runs/b:runs/b"


def test_dashboard_refuses_runs_without_event_files(
    started: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs" / "version_0").mkdir(parents=True)
    (tmp_path / "runs" / "version_0" / "metrics.csv").write_text("step,val/top1\n1,0.5\n")
    assert main(["dashboard"]) == 2
    message = "TensorBoard has nothing to show of runs: it holds metrics.csv only; nm compare reads"
    assert message in capsys.readouterr().err
    assert not started


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no folder 'nowhere' in"),
        (["runs", "--port", "x"], "argument --port: invalid int value: 'x'"),
        (["--port", "-5"], "--port is from 0, to have one chosen, to 65535; got -5."),
        (["runs", "a,b"], "TensorBoard cannot be given 'a,b': a comma or colon is in it."),
    ],
)
def test_dashboard_reports_bad_input_in_one_line(
    arguments: list[str],
    message: str,
    make_run: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_run("runs/a/version_0")
    make_run("a,b")
    assert main(["dashboard", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
