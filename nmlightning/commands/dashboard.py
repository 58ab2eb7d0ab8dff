"""`nm dashboard`: TensorBoard on some runs."""

import argparse
import os
import sys
from typing import NoReturn

from nmlightning.commands.argument_parser import ArgumentParser, print_words
from nmlightning.errors import InputError
from nmlightning.reports.run import find_runs, has_events
from nmlightning.weights.recording_file import FILE_NAME


def run(arguments: list[str]) -> NoReturn:
    """Let TensorBoard take the place of this process."""
    given = _parse(arguments)
    if not 0 <= given.port < 2**16:
        raise InputError(f"--port is from 0, to have one chosen, to {2**16 - 1}; got {given.port}.")
    command = [sys.executable, "-m", "tensorboard.main", *_logdir(given.run)]
    command += ["--port", str(given.port), "--host", given.host]
    has_norms = any((folder / FILE_NAME).is_file() for folder in find_runs(given.run))
    if not has_norms:
        way_out = "add WeightNormTracker to trainer.callbacks."
        print_words(f"nm: no run here has recorded norms: {way_out}", sys.stderr)
    if given.port:  # 0 lets TensorBoard choose
        what, page = ("weight norms", "#custom_scalars") if has_norms else ("the runs", "")
        print(f"nm: {what} are at http://{given.host}:{given.port}/{page}", flush=True)
    safe = {"PYTHONSAFEPATH": "1"}  # or -m would import from the current folder first
    os.execve(sys.executable, command, os.environ | safe)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="nm dashboard",
        description="Start TensorBoard on runs. Custom Scalars holds the page of weight norms.",
    )
    parser.add_argument(
        "run",
        nargs="*",
        default=["runs"],
        help="a run's folder, or one with runs below it (default: runs)",
    )
    parser.add_argument("--port", type=int, default=6006, help="default: %(default)s")
    parser.add_argument("--host", default="localhost", help="default: %(default)s")
    return parser.parse_args(arguments)


def _logdir(paths: list[str]) -> list[str]:
    """Return TensorBoard's option for what to show: one folder, or several with their names."""
    if not any(has_events(folder) for folder in find_runs(paths)):
        raise InputError(
            f"TensorBoard has nothing to show of {', '.join(paths)}: it holds metrics.csv only; "
            "nm compare reads that, and a TensorBoardLogger writes for TensorBoard."
        )
    if len(paths) == 1:
        return ["--logdir", paths[0]]
    for path in paths:
        if "," in path or ":" in path:
            raise InputError(f"TensorBoard cannot be given {path!r}: a comma or colon is in it.")
    return ["--logdir_spec", ",".join(f"{path.strip('/')}:{path}" for path in paths)]
