"""Test files that are run as scripts, each of which starts ranks or is one."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def run_as_script(file: str, *words: object) -> None:
    """Run a test file, which then starts ranks or is one."""
    answer = subprocess.run(
        [sys.executable, file, *map(str, words)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr


def run_ranks(world: int, file: str, *words: object) -> None:
    """Run a test file as each of several ranks at once; its last word is the rank."""
    with ThreadPoolExecutor(world) as pool:
        list(pool.map(lambda rank: run_as_script(file, *words, rank), range(world)))
