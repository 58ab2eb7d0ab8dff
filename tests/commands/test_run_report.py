"""Test what a fit shows: messages, the progress bar, how long it takes, and what comes next."""

import io
import logging
import math
import re
import shlex
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from rich.console import Console

import nmlightning
from lightning_modules import PlModule, make_data
from nmlightning.cli import show_warning
from nmlightning.commands.argument_parser import command_to_copy, print_words
from nmlightning.commands.failures import filter_logs
from nmlightning.commands.run_report import MetricsBar, Stopwatch, batches_left
from trainers import quiet_trainer

OURS = str(Path(nmlightning.__file__).parent / "datamodules" / "some_data.py")


def warn_of_both() -> None:
    with warnings.catch_warnings():
        warnings.showwarning = partial(show_warning, warnings.showwarning)
        warnings.simplefilter("always")
        warnings.warn_explicit("Of 9 pairs\n 2 are left out.", UserWarning, OURS, 7)
        warnings.warn_explicit("Look out.", UserWarning, "/elsewhere/module.py", 7)


def test_own_warnings_are_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    before = warnings.showwarning
    with pytest.warns(UserWarning, match=r"^Look out\.$") as others:
        warn_of_both()
    assert len(others) == 1
    assert warnings.showwarning is before
    assert capsys.readouterr().err == "nm: Of 9 pairs 2 are left out.\n"


def test_stopwatch_of_a_fit_resumed_within_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning does not start the epoch again, of which the rest is timed all the same."""
    watch = Stopwatch()
    monkeypatch.setattr("nmlightning.commands.run_report.print_start", lambda *_: None)
    watch.on_fit_start(None, None)  # type: ignore[arg-type]
    watch.on_train_epoch_end(None, None)  # type: ignore[arg-type]
    assert 0 <= watch.training_seconds < 10


class Terminal(io.StringIO):
    """Says that it is a terminal, and shows what one would after all that was written."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        lines, row, column = [""], 0, 0
        for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", self.getvalue()):
            row += (part == "\n") - (part == "\x1b[1A")
            column = 0 if part in "\r\n" else column
            lines += [""] * (row == len(lines))
            if part == "\x1b[2K":
                lines[row] = ""
            elif part[0] not in "\r\n\x1b":
                lines[row] = lines[row][:column] + part + lines[row][column + len(part) :]
                column += len(part)
        return [line.rstrip() for line in lines]


@pytest.fixture(params=[80, 120])
def terminal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of so many columns."""
    monkeypatch.setenv("COLUMNS", str(request.param))
    screen = Terminal()
    screen.width = request.param  # type: ignore[attr-defined]
    return screen


KERNELS = "NormSwap: 21 L1BatchNorm2d by the formula (float32, NCHW): the kernels are not built: "
NOTICES = [
    KERNELS + "nm kernels build",
    "ImageClassifier: compiling the network for training: the first step takes a minute or more.",
    "NormSwap: " + ", ".join(f"layer{n}.bn" for n in range(40)),
]


@pytest.mark.parametrize("notice", NOTICES)
def test_notices_are_whole_words_in_a_terminal(
    notice: str, terminal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler(terminal)
    monkeypatch.setattr("nmlightning.commands.failures.filtered_handlers", lambda: [handler])
    with filter_logs():
        for text in (notice, "GPU available: False"):
            handler.handle(logging.LogRecord("", logging.INFO, "", 0, text, (), None))
    print_words(notice, terminal)
    lines = terminal.lines()
    assert max(map(len, lines)) <= terminal.width
    assert " ".join(lines).split() == [*notice.split(), *notice.split()]
    monkeypatch.delenv("COLUMNS")
    file = io.StringIO()
    print_words(notice, file)
    assert file.getvalue() == f"{notice}\n"


@pytest.mark.parametrize("run", ["runs/quickstart/version_0", "my runs/a'b [1]/version_12"])
def test_command_to_copy_is_quoted_and_fits(run: str) -> None:
    words = ["nm", "test", "--config", f"{run}/config.yaml", "--ckpt_path", f"{run}/last.ckpt"]
    text = command_to_copy(*words)
    assert max(map(len, text.splitlines())) < 80
    assert shlex.split(text.replace("\\\n", "")) == words


def heads_of(seen: list[list[str]]) -> list[str]:
    """Return what stands before the bar in each picture of it, and the count behind it."""
    return [re.sub(" ━.*━ ", " ", line).partition(" ·")[0] for line, _ in seen]


MOMENTS = ["on_sanity_check_end", "on_train_start", "on_train_batch_end", "on_validation_batch_end"]


@pytest.mark.usefixtures("_keep_sigint")
@pytest.mark.parametrize("moment", ["", *MOMENTS])
def test_bar_counts_from_one_shows_results_and_is_erased(
    moment: str, terminal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nmlightning.commands.run_report._REFRESH_SECONDS", 0)
    bar, seen = MetricsBar(), []
    bar._console = Console(file=terminal, force_terminal=True, width=terminal.width)

    class Look(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append([line for line in terminal.lines() if line][-2:])

    def interrupt(trainer: Any, *_: Any) -> None:
        if not (trainer.sanity_checking and "batch" in moment):
            raise KeyboardInterrupt

    look = Look()
    if moment:
        setattr(look, moment, interrupt)
    options = {"num_sanity_val_steps": 1, "limit_val_batches": 1, "enable_progress_bar": True}
    trainer = quiet_trainer(bar, look, max_epochs=2, limit_train_batches=2, **options)
    module = PlModule()
    log = module.log
    monkeypatch.setattr(module, "log", lambda name, x: log(f"val/{name}", x, prog_bar=True))
    if moment:
        with pytest.raises(SystemExit):
            trainer.fit(module, make_data(), make_data())
    else:
        trainer.fit(module, make_data(), make_data())
        assert heads_of(seen) == [
            "Epoch 1/2 1/2",
            "Epoch 1/2 2/2",
            "Epoch 2/2 1/2",
            "Epoch 2/2 2/2",
        ]
        assert [re.sub(r"=\S+", "", line) for _, line in seen] == [
            *["loss"] * 2,  # nothing of the sanity check
            *["loss  val/loss"] * 2,
        ]
        assert {len(line) for line, _ in seen} == {terminal.width}
        seen.clear()
        steps = {"max_epochs": -1, "max_steps": 3, "limit_train_batches": 2}
        quiet_trainer(bar, look, **steps, **options).fit(module, make_data(), make_data())
        assert heads_of(seen) == ["Epoch 1 1/2", "Epoch 1 2/2", "Epoch 2 1/1"]
    assert set(terminal.lines()) == {""}
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h") > 0


def make_fit(**settings: Any) -> Any:
    """Return a stand-in for the Trainer of a long fit, in its first epoch."""
    known = {"max_epochs": 10, "max_steps": -1, "current_epoch": 0, "global_step": 10}
    known |= {"num_training_batches": 100, "num_val_batches": [20], "accumulate_grad_batches": 1}
    known |= {"val_check_batch": 100, "check_val_every_n_epoch": 1, "callbacks": []}
    known |= {"ckpt_path": None, "is_global_zero": True}
    return SimpleNamespace(**{**known, **settings})


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({}, (990, 200)),
        ({"current_epoch": 7}, (290, 60)),  # resumed
        ({"check_val_every_n_epoch": 5}, (990, 40)),
        ({"val_check_batch": 25}, (990, 800)),
        ({"max_epochs": -1, "max_steps": 510, "accumulate_grad_batches": 2}, (1000, 200)),
        ({"max_epochs": None, "check_val_every_n_epoch": None}, (math.inf, 0)),
        ({"num_val_batches": []}, (990, 0)),
        ({"num_training_batches": math.inf, "max_steps": 110}, (100, 20)),
    ],
)
def test_batches_left_of_a_fit(settings: dict[str, Any], left: tuple[float, float]) -> None:
    assert batches_left(make_fit(**settings), 10) == left


@pytest.mark.parametrize(
    ("seconds", "settings", "line"),
    [
        (
            2.0,
            {},
            "nm: the whole fit takes about 41 min 28 s: 1,000 batches of training, 200 of va",
        ),
        (
            2.0,
            {"ckpt_path": "a.ckpt", "current_epoch": 9},
            "nm: the rest of the fit takes about 5 min 28 s: 100 batches",
        ),
        (0.02, {}, ""),
        (2.0, {"max_epochs": -1}, ""),
    ],
)
def test_stopwatch_says_once_how_long_a_fit_takes(
    seconds: float, settings: dict[str, Any], line: str, monkeypatch: Any, capsys: Any
) -> None:
    """The first two steps, in which networks are compiled, do not count."""
    watch, now, trainer = Stopwatch(), [0.0], make_fit(**settings)
    monkeypatch.setattr("nmlightning.commands.run_report.time.monotonic", lambda: now[0])
    for step in range(12):
        now[0] += 23 * seconds if step < 2 else seconds
        watch.on_train_batch_end(trainer, None, {"loss": torch.tensor(1.0)}, None, step)  # type: ignore[arg-type]
    err = capsys.readouterr().err
    assert err.startswith(line)
    assert err.count("\n") == bool(line)
