"""Python in processes of its own: pieces of code, and test files, each of which starts ranks."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_python(
    *words: object, cwd: Path = ROOT, code: int = 0, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run Python, which imports what the tests import, and has to end with an exit code."""
    paths = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


WITHOUT_US = """
import sys, torch
class Nothing:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] not in ("nmlightning", "pytorch_lightning"), name
sys.meta_path.insert(0, Nothing())
def distance(net, x, y):
    with torch.no_grad(): return float((net(x) - y).abs().max() / y.abs().max())
"""


def run_without_us(code: str, folder: Path) -> list[str]:
    """Run code for which there is neither this package nor Lightning, and return its words."""
    done = run_python("-W", "ignore", "-c", WITHOUT_US + code, cwd=folder, PYTHONPATH="")
    return done.stdout.split()


def run_ranks(world: int, file: str, *words: object) -> None:
    """Run a test file as each of several ranks at once; its last word is the rank."""
    with ThreadPoolExecutor(world) as pool:
        list(pool.map(lambda rank: run_python(file, *words, rank), range(world)))
