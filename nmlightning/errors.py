"""The one error for bad input, and the nearest name for a misspelt one."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """What was given cannot be right; the message is one line that says what to do instead.

    The command line prints it without a traceback. Any other exception is a bug and keeps its own.
    """


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the allowed name closest to `name`, or `""`.

    >>> nearest("l_1", ["l1", "linf"])
    " Did you mean 'l1'?"
    """
    matches = get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def check_choice(what: str, value: object, allowed: Iterable[str]) -> None:
    """Raise InputError unless `value`, the setting called `what`, is one of `allowed`."""
    choices = list(allowed)
    if value not in choices:
        raise InputError(
            f"{what} is {' or '.join(map(repr, choices))}, got {value!r}."
            f"{nearest(str(value), choices)}"
        )
