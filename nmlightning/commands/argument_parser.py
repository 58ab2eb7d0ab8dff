"""The argument parser and output of commands, and the exit codes of all."""

import argparse
import shlex
from typing import Any, NoReturn, TextIO

from nmlightning.errors import InputError, lay_out, terminal_width

FAILED_CHECK = 1
BAD_INPUT = 2
DIVERGED = 3  # what was asked for is done, and a loss ended as NaN or infinity
LOST_PROCESS = 75  # EX_TEMPFAIL of sysexits.h: the same command may well succeed
INTERRUPTED = 130  # 128 + SIGINT, as shells report a program that Ctrl-C ended
UNREAD = 141  # 128 + SIGPIPE: who read the output, such as head, has enough
TERMINATED = 143  # 128 + SIGTERM, which schedulers send before they take the machine away

HELP_WIDTH = 80  # of a file or pipe, as argparse has it


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, except that no option may be abbreviated and an error is an InputError."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; {self.prog} --help lists the options.")

    def format_help(self) -> str:
        return lay_out(super().format_help(), terminal_width() or HELP_WIDTH)


def print_words(text: str, file: TextIO | None = None) -> None:
    """Print to stdout or a file; in a terminal no line is too long and no word is cut in two."""
    print(lay_out(text, terminal_width(file)), file=file)


def command_to_copy(*words: str) -> str:
    """Return a command as a shell takes it, in several lines where one would not fit."""
    whole = shlex.join(words)
    if len(whole) < 80:
        return whole
    pairs = [words[:4], *(words[i : i + 2] for i in range(4, len(words), 2))]
    return " \\\n  ".join(map(shlex.join, pairs))


def print_line(heading: str, text: object) -> None:
    """Print a heading and what is beside it; a path in it stays whole."""
    print(lay_out(f" {heading:<11} {text}", terminal_width(), hang=13))


def progress_bar(label: str) -> Any:
    """Return a bar on stderr, which counts how many of all are done, behind rich's label."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (label, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
