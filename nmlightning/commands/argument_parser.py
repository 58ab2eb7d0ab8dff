"""The argument parser of the commands that train nothing, and the exit codes of all."""

import argparse
from typing import NoReturn

from nmlightning.errors import InputError


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, except that an error is an InputError."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; {self.prog} --help lists what there is.")


FAILED_CHECK = 1
BAD_INPUT = 2
LOST_PROCESS = 75  # EX_TEMPFAIL of sysexits.h: the same command may well succeed
INTERRUPTED = 130  # 128 + SIGINT, as shells report a program that Ctrl-C ended
TERMINATED = 143  # 128 + SIGTERM, which schedulers send before they take the machine away
