"""The one error for bad input, the checks that many settings share, and how lines are laid out."""

import functools
import inspect
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from numbers import Integral
from types import MappingProxyType
from typing import Any, TypeGuard, TypeVar, cast

Constructor = TypeVar("Constructor", bound=Callable[..., None])


class InputError(ValueError):
    """Input that cannot be right; one line says what to do instead, and no traceback is shown."""


def input_error_in(error: BaseException | None) -> InputError | None:
    """Return the InputError that `error` is or was raised from; parsers wrap what they catch."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    return error


def cut(value: object, length: int = 60) -> str:
    """Return the repr of what was given, without what is after the first characters.

    >>> cut("abcdef", length=5)
    "'abc…"
    """
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the allowed name closest to `name`, or `""`.

    >>> nearest("l_1", ["l1", "linf"])
    " Did you mean 'l1'?"
    """
    matches = get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def check_choice(what: str, value: object, allowed: Iterable[object]) -> None:
    """Raise InputError unless `value`, the setting called `what`, is one of `allowed`."""
    choices = list(allowed)
    if value not in choices:
        raise InputError(
            f"{what} is {' or '.join(map(repr, choices))}, got {value!r}."
            f"{nearest(str(value), map(str, choices))}"
        )


def check_flag(what: str, value: bool) -> bool:
    """Return `value`, the setting called `what`, if it is True or False: to Python "no" is true."""
    if value not in (True, False):
        raise InputError(f"{what} is True or False, got {value!r}.")
    return bool(value)


def check_whole_number(what: str, value: int, least: int = 1) -> int:
    """Return `value`, the setting called `what`, if it is whole and at least `least`."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not (whole and value >= least):
        raise InputError(f"{what} must be a whole number of at least {least}, got {value!r}.")
    return int(value)


def check_share(what: str, value: float) -> float:
    """Return `value`, the setting called `what`, if it is at least 0 and less than 1."""
    if not (is_number(value) and 0 <= value < 1):
        raise InputError(f"{what} must be at least 0 and less than 1, got {value!r}.")
    return float(value)


def check_weight_decay(decay: object) -> None:
    """Raise InputError for anything but a finite number of 0 or more."""
    if not (is_number(decay) and 0 <= decay < math.inf):
        raise InputError(f"weight_decay must be 0 or more, got {decay!r}.")


def check_positive(**settings: object) -> None:
    """Raise InputError for anything but a positive number, or None, which stands for none."""
    for name, value in settings.items():
        if value is not None and not (is_number(value) and value > 0):
            raise InputError(f"{name} is a positive number, or None, got {value!r}.")


def check_lists(**arguments: object) -> None:
    """Raise InputError for anything but a list of strings."""
    for name, value in arguments.items():
        if isinstance(value, str):
            raise InputError(f"{name} is a list, got the string {value!r}: write [{value!r}].")
        if not (isinstance(value, Collection) and all(isinstance(item, str) for item in value)):
            raise InputError(f"{name} is a list of strings, got {value!r}.")


def is_number(value: object) -> TypeGuard[float]:
    """Return True for a real number; True and False, which Python counts as 1 and 0, are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def given_by_keyword(name: str) -> Callable[[Constructor], Constructor]:
    """Let the constructor of a norm refuse, as its second argument, what is meant as `name`.

    That argument is eps, as it is torch's; a number of 1 or more is none that anyone gives.
    """

    def decorate(construct: Constructor) -> Constructor:
        @functools.wraps(construct)
        def checked(self: Any, *arguments: Any, **keywords: Any) -> None:
            if len(arguments) > 1 and is_number(arguments[1]) and arguments[1] >= 1:
                shape, value = arguments[:2]
                raise InputError(
                    f"The second argument of {type(self).__name__} is eps, as it is torch's, got "
                    f"{value!r}: write {type(self).__name__}({shape!r}, {name}={value!r})."
                )
            construct(self, *arguments, **keywords)

        return cast(Constructor, checked)

    return decorate


def terminal_width(stream: Any = None) -> int | None:
    """Return the columns of a terminal, stdout by default, or COLUMNS; None for a file or pipe."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal():
        return int(columns) or None
    try:
        return os.get_terminal_size((stream or sys.stdout).fileno()).columns or None
    except (OSError, ValueError, AttributeError):
        return None


def lay_out(text: str, width: int | None, hang: int | None = None) -> str:
    """Return the text with its lines broken between words where they are longer than `width`.

    Later lines are indented by `hang` columns; None means as far as the text, which begins after
    a heading and two spaces, or after its indent. A longer word, such as a path, stays whole.
    """
    return "\n".join(_fill(x, width, hang) for x in text.split("\n")) if width else text


def _fill(line: str, width: int, hang: int | None) -> str:
    if hang is None:
        heading = re.match(r" *(?:\S+(?: \S+)*  +)?", line)
        hang = len(heading[0]) if heading else 0
    if hang + max(map(len, line[hang:].split()), default=0) > width:
        hang = len(line) - len(line.lstrip()) + 2
    return textwrap.fill(
        line, width, subsequent_indent=" " * hang, break_long_words=False, break_on_hyphens=False
    )


def describe_arguments(
    thing: Any, skip: int = 0, known: Mapping[str, Any] = MappingProxyType({})
) -> str:
    """Return `name=value, …` of the constructor's arguments behind the first that are to `skip`.

    What is empty, None or False by default and now is left out. `known` are arguments that are not
    attributes of the same name.
    """
    shown = []
    for name, argument in list(inspect.signature(type(thing)).parameters.items())[skip:]:
        if name in known or hasattr(thing, name):
            value = known[name] if name in known else getattr(thing, name)
            if value or argument.default or name == "eps":
                shown.append(f"{name}={value!r}")
    return ", ".join(shown)


def repr_by_arguments(thing: Any) -> str:
    """Return `Name(argument=value, …)`, as `describe_arguments` shows them: a `__repr__`."""
    return f"{type(thing).__name__}({describe_arguments(thing)})"
