"""Names of parameters: plain names, glob patterns on them, and short lists for messages."""

import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase


def plain_name(name: str) -> str:
    """Return a parameter's name without what `torch.compile` or a parametrization add to it.

    >>> plain_name("_orig_mod.conv.parametrizations.weight.original1")
    'conv.weight'
    """
    name = re.sub(r"(^|\.)parametrizations\.(\w+)\.original\d*$", r"\1\2", name)
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether any of the glob patterns matches the whole name.

    >>> matches("layer1.conv.weight", ["layer1.*"])
    True
    """
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def unmatched(patterns: Iterable[str], names: Collection[str]) -> str | None:
    """Return the first pattern that matches none of the names, or None if each matches one."""
    fruitless = (p for p in patterns if not any(fnmatchcase(name, p) for name in names))
    return next(fruitless, None)


def some(names: Iterable[str], shown: int = 5) -> str:
    """Return the first names and how many more there are, or "nothing".

    >>> some(["a", "b", "c"], 2)
    'a, b and 1 more'
    >>> some([])
    'nothing'
    """
    listed = list(names)
    more = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return (", ".join(listed[:shown]) or "nothing") + more


def by_reason(reasons: Mapping[str, str], shown: int = 3) -> list[str]:
    """Return a line for each reason, behind the names that it is of.

    >>> by_reason({"a": "frozen", "b": "frozen", "c": "shared"}, 1)
    ['a and 1 more: frozen', 'c: shared']
    """
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [f"{some(named, shown)}: {reason}" for reason, named in names.items()]
