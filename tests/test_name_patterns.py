"""Test patterns on names, and lists of names for messages."""

import pytest

from nmlightning.errors import InputError, check_lists
from nmlightning.name_patterns import matches, some, unmatched


def test_matches() -> None:
    assert matches("layer1.conv.weight", ["head.*", "layer1.*"])
    assert not matches("layer1.conv.weight", ["layer1", "*.Weight"])
    assert not matches("layer1.conv.weight", [])


def test_unmatched() -> None:
    assert unmatched(["a*", "c", "d"], ["ab", "b"]) == "c"
    assert unmatched(["a*"], ["ab", "b"]) is None
    assert unmatched([], []) is None


def test_some() -> None:
    assert some([]) == "nothing"
    assert some(["a", "b"], 2) == "a, b"
    assert some(iter("abcd"), 2) == "a, b and 2 more"


@pytest.mark.parametrize(
    ("value", "message"),
    [("a*", r"include is a list, got the string 'a\*': write \['a\*'\]"), (3, "strings, got 3")],
)
def test_check_lists(value: object, message: str) -> None:
    check_lists(include=["a*"], exclude=())
    with pytest.raises(InputError, match=message):
        check_lists(include=value)
