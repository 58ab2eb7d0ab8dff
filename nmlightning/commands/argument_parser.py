"""The parser of the commands that train nothing: its errors are one line."""

import argparse
from typing import NoReturn

from nmlightning.errors import InputError


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, except that an error is an InputError."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; {self.prog} --help lists what there is.")
