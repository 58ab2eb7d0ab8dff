"""What commands print, at the widths of terminals: no line is too long, no word and column lost."""

import fcntl
import os
import re
import shlex
import struct
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nmlightning.cli import COMMANDS, main
from nmlightning.commands import doctor
from nmlightning.commands.failures import filtered_handlers
from nmlightning.errors import lay_out, terminal_width
from nmlightning.reports.formatting import Grid, show
from quickstart_runs import SMALL, fit_in

QUICKSTART = " ".join(["quickstart", *SMALL])
STEERS = (
    "--trainer.callbacks+ WeightNormTracker --trainer.callbacks.steering Hyperball "
    "--model.optimizer.weight_decay 0 --trainer.callbacks.list_weights"
)
LAST = "runs/quickstart/version_0/checkpoints/last.ckpt"
SCREENS = [
    f"fit --config {QUICKSTART} {STEERS} false",
    f"fit --config {QUICKSTART} {STEERS} true",
    f"test --config {QUICKSTART} --ckpt_path {LAST}",
    f"probe {QUICKSTART} --batches 1",
    "doctor",
    "compare runs",
    "kernels show",
    f"export {LAST} --format state_dict --overwrite",
    "shard images OUT --damaged skip",
    *(f"{command} --help" for command in ("", *COMMANDS)),
    *(
        "frobnicate",
        f"fit --config {QUICKSTART} --trainer.max_epoch 1",
        "export nope.ckpt --format onnx",
    ),
    *("translate nope.ckpt", f"translate {LAST}", "compare nope", "dashboard nope"),
    *("shard nope shards", "probe quickstar", "kernels rebuild"),
]


def words_of(text: str) -> set[str]:
    """Return the words, with # for each number and dates and versions that no two runs share."""
    return set(re.sub(r"\d[\d.,:]*", "#", re.sub("[─│]+", " ", text)).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in it."""
    return fit_in(tmp_path_factory.mktemp("w"), "quickstart", *SMALL).parents[2]


@pytest.fixture
def screen(
    folder: Path,
    image_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Callable[[str, int | None], str]:
    """Return what a command prints in a terminal of a width, or to a pipe."""

    def run(words: str, columns: int | None) -> str:
        monkeypatch.chdir(folder)
        if "images" in words and not Path("images").exists():
            image_folder.rename("images")
        for handler in filtered_handlers():
            monkeypatch.setattr(handler, "stream", sys.stderr)
        monkeypatch.setattr(doctor, "TIMED", {4: (2, 8, 4, 4), 2: (4, 16)})
        monkeypatch.setattr(doctor, "ROUNDS", 2)
        if columns is None:
            monkeypatch.delenv("COLUMNS", raising=False)
        else:
            monkeypatch.setenv("COLUMNS", str(columns))
        with suppress(SystemExit):  # of --help
            main(shlex.split(words.replace("OUT", f"shards{columns or 0}")))
        return "\n".join(capfd.readouterr())

    return run


@pytest.mark.parametrize("words", SCREENS)
def test_screen_keeps_its_words_at_every_width(words: str, screen: Any) -> None:
    piped = words_of(screen(words, None))
    assert piped
    for columns in (80, 120):
        text = screen(words, columns)
        assert words_of(text) == piped
        long = [line for line in text.splitlines() if len(line.rstrip()) > columns]
        assert not [line for line in long if " " in line.strip()], long  # a path alone may be


def test_width_is_that_of_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 72, 0, 0))
    with open(slave, "w") as terminal, open(os.devnull, "w") as file:
        assert terminal_width(terminal) == 72
        assert terminal_width(file) is None
    os.close(master)


def test_lines_go_on_below_their_text() -> None:
    assert lay_out(" run  one two three", 12) == " run  one\n      two\n      three"
    assert lay_out("a /long/path/to/a/file", 12) == "a\n  /long/path/to/a/file"
    assert lay_out("one two three", None) == "one two three"


@pytest.mark.parametrize("no_colour", [False, True])
def test_colours_are_left_out_when_asked(no_colour: bool, monkeypatch: Any, capsys: Any) -> None:
    from rich.text import Text

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_colour:
        monkeypatch.setenv("NO_COLOR", "1")
    table = Grid(("a", "b"), [("x", Text("12 %", "red"))], numbers=True)
    show(table)
    assert ("\x1b[31m" in capsys.readouterr().out) is not no_colour
    assert "\x1b" not in str(table)
