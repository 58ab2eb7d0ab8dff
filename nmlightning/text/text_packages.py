"""The packages of the `text` extra, imported where they are first used."""

from importlib import import_module
from typing import Any

from nmlightning.errors import InputError


def import_text_package(name: str) -> Any:
    """Return the package `name`, or raise InputError that names the extra it comes with."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # something is wrong with the package itself
            raise
        raise InputError(
            f"this needs the package {name}: pip install 'nmlightning[text]'."
        ) from error
