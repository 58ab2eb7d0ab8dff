"""Test that the benchmarks of a training step run, and print a line for each addition."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
LINES = {"normalised_weights": "bounded, gains", "weight_norms": "record"}


@pytest.mark.parametrize("name", LINES)
def test_it_runs(name: str) -> None:
    words = ["--net", "resnet20", "--batch", "2", "--rounds", "2"]
    answer = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), *words], capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    assert f"{LINES[name]} " in answer.stdout
    assert answer.stdout.count("% of a step") > 4
