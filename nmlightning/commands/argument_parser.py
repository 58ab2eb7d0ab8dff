"""The argument parser and output of commands, and the exit codes of all."""

import argparse
import shlex
import shutil
import sys
import textwrap
from typing import Any, NoReturn, TextIO

from nmlightning.errors import InputError

FAILED_CHECK = 1
BAD_INPUT = 2
DIVERGED = 3  # what was asked for is done, and a loss ended as NaN or infinity
LOST_PROCESS = 75  # EX_TEMPFAIL of sysexits.h: the same command may well succeed
INTERRUPTED = 130  # 128 + SIGINT, as shells report a program that Ctrl-C ended
TERMINATED = 143  # 128 + SIGTERM, which schedulers send before they take the machine away


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, except that no option may be abbreviated and an error is an InputError."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; {self.prog} --help lists the options.")


def print_words(text: str, file: TextIO | None = None) -> None:
    """Print a line, on stdout or in `file`; in a terminal none of its words is cut in two."""
    file = file or sys.stdout
    if file.isatty():
        width = shutil.get_terminal_size().columns
        text = textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
    print(text, file=file)


def command_to_copy(*words: str) -> str:
    """Return a command as a shell takes it, in several lines where one would not fit."""
    whole = shlex.join(words)
    if len(whole) < 80:
        return whole
    pairs = [words[:4], *(words[i : i + 2] for i in range(4, len(words), 2))]
    return " \\\n  ".join(map(shlex.join, pairs))


def print_line(heading: str, text: object) -> None:
    """Print a heading and what is under it; a path in it is not wrapped."""
    from rich.console import Console

    Console().print(f" {heading:<11} {text}", soft_wrap=True, highlight=False, markup=False)


def progress_bar(label: str) -> Any:
    """Return a bar on stderr, which counts how many of all are done, behind rich's label."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (label, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
