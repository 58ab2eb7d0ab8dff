"""Makes the runs of plan.yaml that are not done yet, and keeps what they gave.

    python results/run_plan.py [--only NAME …] [--minutes K] [--jobs 2] [--data-root data] [--again]
    python results/run_plan.py --keep          # make none, but write again what finished runs gave

What a run needs is made before it. A run that was stopped in any way resumes from its last epoch.
Its folder is results/runs/<run>-<seed>, with its log; kept are results/<table>/<run>-<seed>.csv and
.json.
"""

import argparse
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from keep_run import keep_run
from plan import HERE, Run, read_plan

from nmlightning.commands.argument_parser import DIVERGED

SECONDS_TO_END = 60  # for a run that was asked to
LOWEST_PRIORITY = 19


class Folder:
    """The folder of a run, with a line for each of its attempts that this program saw end.

    Args:
        run: of the plan.
        results: the folder that holds `runs` and the tables.
    """

    def __init__(self, run: Run, results: Path) -> None:
        self.run = run
        self.path = results / "runs" / str(run)
        self.kept = results / run.table / f"{run}.json"
        self._attempts = self.path / "attempts.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def attempts(self) -> list[dict[str, Any]]:
        lines = self._attempts.read_text("utf-8").splitlines() if self._attempts.is_file() else []
        return [json.loads(line) for line in lines]

    @property
    def stage(self) -> int:
        """How many of the run's commands are over."""
        return sum(attempt["ended"] for attempt in self.attempts)

    @property
    def is_finished(self) -> bool:
        return self.stage >= len(self.run.stages)

    def note(self, code: int, seconds: float) -> None:
        """Add an attempt: its exit code and the CPU time of its process."""
        stopped = self.run.settings.get("may_stop")
        as_expected = bool(code and stopped and stopped in self.log.read_text("utf-8"))
        attempt = {
            "commit": commit(),
            "ended": code in (0, DIVERGED) or as_expected,
            "code": code,
            "cpu_seconds": round(seconds, 1),
        }
        with self._attempts.open("a", encoding="utf-8") as file:
            file.write(json.dumps(attempt) + "\n")

    def keep(self) -> None:
        """Write the CSV and the JSON of the run, which is finished."""
        keep_run(self.run, self.path, self.kept, self.attempts)
        say(f"{self.run} is done: {self.kept}")


def commit() -> str:
    command = ("git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")
    found = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


class Runner:
    """Makes runs, some at a time.

    Args:
        folders: of all runs that are to be made, and of those that they need, in order.
        data_root: the folder that holds CIFAR-10 and multi30k.
        jobs: runs at a time, of one thread each.
        niceness: of their processes.
    """

    def __init__(
        self, folders: dict[str, Folder], data_root: Path, jobs: int, niceness: int
    ) -> None:
        self._folders = folders
        self._pending = [folder for folder in folders.values() if not folder.is_finished]
        self._active: dict[int, tuple[Folder, subprocess.Popen[bytes]]] = {}
        self._data_root = data_root.resolve()
        self._jobs = jobs
        self._niceness = niceness

    def make_all(self) -> list[str]:
        """Make all runs and return the names of those that could not be."""
        failed: list[str] = []
        for folder in self._folders.values():
            if folder.is_finished and not folder.kept.is_file():
                folder.keep()
        try:
            while self._start_some(failed):
                folder, code = self._wait_for_one()
                if not folder.attempts[-1]["ended"]:
                    say(f"{folder.run} failed with exit code {code}: see {folder.log}")
                    failed.append(str(folder.run))
                elif folder.is_finished:
                    folder.keep()
                else:
                    self._pending.insert(0, folder)
        finally:
            self._stop()
        for folder in self._pending:
            say(f"{folder.run} was not begun: it needs {', '.join(folder.run.needs)}")
        return [*failed, *(str(folder.run) for folder in self._pending)]

    def _start_some(self, failed: list[str]) -> bool:
        """Start what there is room for, and return whether anything is at work."""
        while len(self._active) < self._jobs:
            ready = (f for f in self._pending if all(map(self._is_finished, f.run.needs)))
            if (folder := next(ready, None)) is None:
                break
            self._pending.remove(folder)
            if not self._start(folder):
                failed.append(str(folder.run))
        return bool(self._active)

    def _is_finished(self, name: str) -> bool:
        return self._folders[name].is_finished

    def _start(self, folder: Folder) -> bool:
        """Start the next command of a run, unless an earlier one of it is still at work."""
        folder.path.mkdir(parents=True, exist_ok=True)
        data = folder.path / "data"
        if not data.exists():
            data.unlink(missing_ok=True)
            data.symlink_to(self._data_root)
        words = folder.run.stages[folder.stage]
        command = ["-m", "nmlightning", *words[1:]]
        if words[0] != "nm":
            command = [str(HERE / words[0]), *words[1:]]
        with (folder.path / "lock").open("w") as lock, folder.log.open("ab") as log:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"{folder.run} is at work already, for another runner or without one")
                return False
            log.write(f"$ {shlex.join(words)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                ["nice", "-n", str(self._niceness), sys.executable, *command],
                cwd=folder.path,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno()],  # it holds the lock as long as it lives
            )
        say(f"{folder.run} begins, part {len(folder.attempts) + 1}")
        self._active[process.pid] = folder, process
        return True

    def _wait_for_one(self) -> tuple[Folder, int]:
        pid, status, usage = os.wait4(-1, 0)
        folder, process = self._active.pop(pid)
        process.returncode = os.waitstatus_to_exitcode(status)
        folder.note(process.returncode, usage.ru_utime + usage.ru_stime)
        return folder, process.returncode

    def _stop(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, lambda *_: self._send(signal.SIGKILL))
        self._send(signal.SIGTERM)
        signal.alarm(SECONDS_TO_END)
        while self._active:
            folder, _ = self._wait_for_one()
            say(f"{folder.run} was stopped, and will resume")
        signal.alarm(0)

    def _send(self, number: signal.Signals) -> None:
        for pid in self._active:
            os.kill(pid, number)


def environment() -> dict[str, str]:
    """Return that of a run: this checkout, one thread."""
    paths = [str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def choose(plan: dict[str, Run], results: Path, only: list[str], again: bool) -> dict[str, Folder]:
    """Return the folders of what is to be made, and of what that needs, in the plan's order.

    Args:
        plan: all runs.
        results: where they are kept.
        only: tables, runs or runs with a seed, `wd_on-1`; empty means all.
        again: also what is kept already, as in a fresh checkout, but was not made in it.
    """
    folders = {name: Folder(run, results) for name, run in plan.items()}
    known = {word for run in plan.values() for word in (run.table, run.name, str(run))}
    if unknown := sorted(set(only) - known):
        raise SystemExit(f"there is no {', '.join(unknown)} in the plan.")
    wanted = {
        name
        for name, run in plan.items()
        if (not only or {run.table, run.name, name} & set(only))
        and (again or not folders[name].kept.is_file())
    }
    for name in reversed(list(plan)):
        if name in wanted:
            wanted.update(plan[name].needs)
    return {name: folder for name, folder in folders.items() if name in wanted}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="tables, runs, or runs with a seed")
    parser.add_argument("--minutes", type=float, default=0, help="stop after this time")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--niceness", type=int, default=LOWEST_PRIORITY, help="of their processes")
    parser.add_argument("--data-root", type=Path, default=HERE.parent / "data")
    parser.add_argument("--again", action="store_true", help="make again what is kept already")
    parser.add_argument("--keep", action="store_true", help="only write what was made again")
    parser.add_argument("--plan", type=Path, default=HERE / "plan.yaml")
    parser.add_argument("--results", type=Path, default=HERE)
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    signal.setitimer(signal.ITIMER_REAL, 60 * options.minutes)
    results = options.results.resolve()
    again = options.again or options.keep
    folders = choose(read_plan(options.plan), results, options.only, again)
    if options.keep:
        for folder in folders.values():
            if folder.is_finished:
                folder.keep()
        return 0
    say(f"{len(folders)} runs to make")
    failed = Runner(folders, options.data_root, options.jobs, options.niceness).make_all()
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
