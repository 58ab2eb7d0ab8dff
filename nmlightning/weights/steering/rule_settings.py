"""The checks of settings that several rules have."""

from pathlib import Path

from nmlightning.errors import InputError, is_number
from nmlightning.weights.history import NormHistory


def check_positive(**settings: object) -> None:
    """Raise InputError for anything but a positive number, or None, which stands for none."""
    for name, value in settings.items():
        if value is not None and not (is_number(value) and value > 0):  # type: ignore[operator]
            raise InputError(f"{name} is a positive number, or None, got {value!r}.")


def check_reference(reference: object) -> None:
    """Raise InputError for anything but a recording or where one is."""
    if not isinstance(reference, NormHistory | str | Path):
        raise InputError(f"reference is a NormHistory or a path, got {reference!r}.")
