"""A file that a command writes where it is told to, and never over the work of others."""

from pathlib import Path

from nmlightning.errors import InputError


def check_replaceable(option: str, file: Path, mark: str, what: str) -> None:
    """Raise InputError if `file` is a folder, or exists without the mark of what is written there.

    Args:
        option: that named it.
        file: which may exist from an earlier call.
        mark: text that everything written there holds.
        what: it is called, such as "page of nm compare".
    """
    if file.is_dir():
        raise InputError(f"{option}: {file} is a folder; name a file in it.")
    if file.exists() and mark not in file.read_text(encoding="utf-8", errors="replace"):
        raise InputError(f"{option}: {file} is no {what}; give another name.")


def write_file(option: str, file: Path, text: str) -> None:
    """Write the file, or raise InputError."""
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{option}: {file} cannot be written: {error.strerror}.") from error
