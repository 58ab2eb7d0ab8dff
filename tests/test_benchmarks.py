"""Test that the benchmarks run, and print a line for each thing that they measure."""

import re
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


def test_translating_runs() -> None:
    sizes = {"vocab_size": 30, "width": 16, "hidden": 16, "heads": 2, "layers": 1, "batch": 4}
    words = [f"--{name}={value}" for name, value in {**sizes, "length": 6, "rounds": 2}.items()]
    answer = subprocess.run(
        [sys.executable, str(FOLDER / "translation.py"), *words], capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    for line in (r"training: ours \d+ tokens/s, torch's layers \d+", r"decoding: with cache \d+ "):
        assert re.search(line + r".*ratio \d+\.\d\d \(", answer.stdout)
