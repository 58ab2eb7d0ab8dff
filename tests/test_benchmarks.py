"""Test that the benchmarks run, and print a line for each thing that they measure."""

import subprocess
import sys
from collections.abc import Callable
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


def test_reading_images_runs(make_image_folder: Callable[..., Path]) -> None:
    words = [str(make_image_folder()), "--rounds", "2", "--batch", "4", "--image_size", "32"]
    answer = subprocess.run(
        [sys.executable, str(FOLDER / "image_reading.py"), *words], capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count(" images/s (") == 1
