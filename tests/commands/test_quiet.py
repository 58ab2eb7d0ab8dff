"""Test what `nm` makes of warnings: its own are a line, others stay what they are."""

import warnings
from pathlib import Path

import pytest

import nmlightning
from nmlightning.commands.run_report import filter_logs

OURS = str(Path(nmlightning.__file__).parent / "datamodules" / "some_data.py")


def warn_of_both() -> None:
    with filter_logs():
        warnings.simplefilter("always")
        warnings.warn_explicit("Of 9 pairs\n 2 are left out.", UserWarning, OURS, 7)
        warnings.warn_explicit("Look out.", UserWarning, "/elsewhere/module.py", 7)


def test_our_own_warnings_are_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    before = warnings.showwarning
    with pytest.warns(UserWarning, match=r"^Look out\.$") as others:
        warn_of_both()
    assert len(others) == 1
    assert warnings.showwarning is before
    assert capsys.readouterr().err == "nm: Of 9 pairs 2 are left out.\n"
