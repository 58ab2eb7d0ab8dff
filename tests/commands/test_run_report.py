"""Test the filters of messages and the stopwatch."""

import warnings
from functools import partial
from pathlib import Path

import pytest

import nmlightning
from nmlightning.cli import show_warning
from nmlightning.commands.run_report import Stopwatch

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


def test_stopwatch_of_a_fit_resumed_within_an_epoch() -> None:
    """Lightning does not start the epoch again, of which the rest is timed all the same."""
    watch = Stopwatch()
    watch.on_fit_start(None, None)  # type: ignore[arg-type]
    watch.on_train_epoch_end(None, None)  # type: ignore[arg-type]
    assert 0 <= watch.training_seconds < 10
