"""YAML within limits: a text that means two things, or takes a reader for ever, is refused."""

from typing import Any

import yaml

from nmlightning.errors import InputError

# Configs that are shipped or saved have under 500 nodes, 10 levels deep.
MAX_NODES = 100_000
MAX_DEPTH = 100
MAX_DIGITS = 308  # as many as the largest floating-point number has

_YAML_TAG = "tag:yaml.org,2002:"
_KINDS = ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge")
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _AnyLoader(_Loader):  # type: ignore[misc, valid-type]
    """Reads what any project's hyper-parameters hold; of an object it takes the type's name."""


_AnyLoader.add_multi_constructor("", lambda loader, suffix, node: suffix)


def load_yaml(text: str, what: str, *, objects: bool = False) -> Any:
    """Return the content of a YAML text, which is called `what` in an error.

    With `objects` a value of an unknown type stands for the type's name, and is not refused.
    """
    try:
        check_yaml(text, objects=objects)
        return yaml.load(text, _AnyLoader if objects else _Loader)
    except Exception as error:  # ValueError for the 99th of a month, KeyError for !!bool x
        raise InputError(f"{what} is not YAML: {describe_error(error)}.") from None


def describe_error(error: Exception) -> str:
    """Return in one line what a reader of YAML raised."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split()) or repr(error)
    mark = error.problem_mark
    return f"{error.problem} in line {mark.line + 1}" if mark else str(error.problem)


def check_yaml(text: str, *, objects: bool = False) -> None:
    """Read a YAML text without making anything of it.

    Raises:
        yaml.MarkedYAMLError: a key is twice in one place; a name stands inside of what it names; it
            is nested too deep, or too large once names are replaced by what they name; a number is
            too long; a text has a NUL; or, unless `objects`, there is a type that JSON lacks.
    """
    loader = _Loader(text)
    try:
        nodes = _Nodes(loader, objects)
        while loader.check_event():
            event = loader.get_event()
            if isinstance(event, yaml.NodeEvent):
                nodes.count(event)
    finally:
        loader.dispose()


class _Nodes:
    """Counts the nodes of a YAML text."""

    def __init__(self, loader: Any, objects: bool) -> None:
        self.loader = loader
        self.objects = objects
        self.named: dict[str, int] = {}  # the nodes in what has a name; 0 until its end

    def count(self, event: Any, depth: int = 0) -> int:
        """Return the nodes in what begins with `event`, which is read to its end."""
        if isinstance(event, yaml.AliasEvent):
            named = self.named.get(event.anchor, 1)
            _refuse(not named, f"*{event.anchor} refers to itself", event)
            return named
        self._check_type(event)
        _refuse(depth > MAX_DEPTH, f"more than {MAX_DEPTH} levels are nested", event)
        self.named[event.anchor] = 0
        count, place, keys = 1, 0, set()
        while isinstance(event, yaml.CollectionStartEvent):
            inner = self.loader.get_event()
            if isinstance(inner, yaml.CollectionEndEvent):
                break
            is_key = isinstance(event, yaml.MappingStartEvent) and place % 2 == 0
            if is_key and isinstance(inner, yaml.ScalarEvent):
                _refuse(inner.value in keys, f"the key {inner.value!r} is given twice", inner)
                keys.add(inner.value)
            count, place = count + self.count(inner, depth + 1), place + 1
            _refuse(count > MAX_NODES, f"more than {MAX_NODES:,} values", inner)
        self.named[event.anchor] = count
        return count

    def _check_type(self, event: Any) -> None:
        """Refuse a type that JSON lacks, a number that no float is as large as, and NUL."""
        tag = event.tag or _YAML_TAG
        known = tag.startswith(_YAML_TAG) and tag.removeprefix(_YAML_TAG) in ("", *_KINDS)
        problem = f"a value of type {tag.removeprefix(_YAML_TAG)!r}"
        _refuse(not (known or self.objects), problem, event)
        if not isinstance(event, yaml.ScalarEvent):
            return
        _refuse("\0" in event.value, "a NUL character", event)  # which no path can have
        if len(event.value) > MAX_DIGITS:
            tag = event.tag or self.loader.resolve(yaml.ScalarNode, event.value, event.implicit)
            digits = f"a number of {len(event.value)} digits"
            _refuse(tag == f"{_YAML_TAG}int", digits, event)


def _refuse(wrong: bool, problem: str, event: Any) -> None:
    if wrong:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
