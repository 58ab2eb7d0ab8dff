import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nmlightning.cli import main


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were started, none of which runs."""
    commands: list[list[str]] = []

    def start(command: list[str], **_: Any) -> Any:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", start)
    return commands


def test_one_folder(
    make_run: Callable[..., Path],
    started: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_run("runs/a/version_0")
    monkeypatch.chdir(tmp_path)
    assert main(["dashboard"]) == 0
    program = [sys.executable, "-m", "tensorboard.main"]
    assert started == [
        [*program, "--logdir", "runs", "--port", "6006", "--host", "localhost"],
    ]


def test_several_folders(
    make_run: Callable[..., Path],
    started: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_run("runs/a/version_0")
    make_run("runs/b/version_0")
    monkeypatch.chdir(tmp_path)
    assert main(["dashboard", "runs/a/", "runs/b", "--port", "0"]) == 0
    assert started[0][3:5] == ["--logdir_spec", "runs/a:runs/a/,runs/b:runs/b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no folder 'nowhere' in"),
        (["runs", "--port", "x"], "argument --port: invalid int value: 'x'"),
        (["runs", "a,b"], "TensorBoard cannot be given 'a,b': a comma or colon is in it."),
    ],
)
def test_bad_input(
    arguments: list[str],
    message: str,
    make_run: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_run("runs/a/version_0")
    make_run("a,b")
    monkeypatch.chdir(tmp_path)
    assert main(["dashboard", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_ctrl_c(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupt)
    assert main(["dashboard", str(make_run())]) == 130
