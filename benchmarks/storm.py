"""Kills runs, feeds commands with bad input and fills disks; prints tried, survived and lost.

    make storm
    .venv/bin/python benchmarks/storm.py --seed 7 --only kills

Of a seed everything follows but when a signal arrives. Runs are forks of one process that has
imported torch, two at a time. What is lost is listed with the seed and number that repeat it.
"""

import argparse
import contextlib
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

PARTS = ("inputs", "kills", "disk")
MEMORY = 12 << 30  # bytes of a process, which a bad input may ask for


class Verdict(NamedTuple):
    """What became of one trial; `reason` is empty if nothing was lost."""

    name: str
    reason: str


class Trial(NamedTuple):
    """One thing to try: its name, and what returns the reason why something is lost, or ""."""

    name: str
    run: Callable[[], str]


def fork(body: Callable[[], int], log: Path | None = None) -> int:
    """Run the body in a child of this process, which exits with what it returns; return its id."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        if log:
            opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(opened, 1)
            os.dup2(opened, 2)
        code = body()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(process: int, seconds: float) -> int | None:
    """Return the exit code of a child, negative for a signal; None, once it is killed, if late."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def nm(*words: str, log: Path | None = None, before: Callable[[], None] | None = None) -> int:
    """Start `nm` in a child and return its id; `before` is called in it first."""

    def body() -> int:
        from nmlightning.cli import main

        if before:
            before()
        return main(list(words))

    return fork(body, log)


def try_all(trials: Sequence[Trial], seconds: float, processes: int = 1) -> list[Verdict]:
    """Run each trial in a child and a folder of its own, and return what became of them."""
    waiting, running, verdicts = list(trials), {}, []
    with tempfile.TemporaryDirectory(prefix="storm-") as place:
        while waiting or running:
            while waiting and len(running) < processes:
                trial = waiting.pop(0)
                folder = Path(place) / str(len(waiting))
                folder.mkdir()
                process = fork(lambda: _answer(trial, folder), folder / "log")  # noqa: B023
                running[process] = (trial, folder, time.monotonic() + seconds)
            for process, (trial, folder, end) in list(running.items()):
                if time.monotonic() < end and not os.waitid(
                    os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT
                ):
                    continue
                del running[process]
                verdicts += _verdicts(trial, folder, wait(process, 0.1))
            time.sleep(0.02)
    return verdicts


def _answer(trial: Trial, folder: Path) -> int:
    os.chdir(folder)
    (folder / "answer").write_text(trial.run())
    return 0


def _verdicts(trial: Trial, folder: Path, code: int | None) -> list[Verdict]:
    if code != 0:
        tail = (folder / "log").read_text(errors="replace").strip().splitlines()[-1:]
        return [Verdict(trial.name, "hangs" if code is None else f"exit {code}: {tail}")]
    lines = (folder / "answer").read_text().split("\n")
    return [Verdict(trial.name, line) for line in lines]


def main() -> int:
    """Print the table, and return 1 if anything was lost."""
    parser = argparse.ArgumentParser(description="Try to lose or to confuse a run.")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--inputs", type=int, default=520, help="how many (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=21, help="how many (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="at once (default: %(default)s)")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    import sklearn.datasets  # noqa: F401
    import storm_disk
    import storm_inputs
    import storm_kills

    import nmlightning.commands.fit  # noqa: F401

    plan = {
        "inputs": lambda: storm_inputs.run(given.seed, given.inputs, given.processes),
        "kills": lambda: storm_kills.run(given.seed, given.kills, given.processes),
        "disk": storm_disk.run,
    }
    lost: list[str] = []
    print(f"seed {given.seed}\n{'part':<8}{'tried':>7}{'survived':>10}{'lost':>6}{'seconds':>9}")
    for part in given.only:
        start = time.monotonic()
        verdicts = plan[part]()
        bad = [f"{part}: {name}: {reason}" for name, reason in verdicts if reason]
        counts = f"{len(verdicts):>7}{len(verdicts) - len(bad):>10}{len(bad):>6}"
        print(f"{part:<8}{counts}{time.monotonic() - start:>9.0f}", flush=True)
        lost += bad
    print(*lost, sep="\n")
    return int(bool(lost))


def make(class_path: str, **arguments: Any) -> dict[str, Any]:
    """Return a class as configs have it."""
    return {"class_path": class_path, "init_args": arguments}


def limit_memory() -> None:
    """Let this process have no more than MEMORY bytes."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


if __name__ == "__main__":
    sys.exit(main())
