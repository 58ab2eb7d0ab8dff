"""Test patterns on names, and lists of names for messages."""

import pytest

from nmlightning.errors import InputError, check_lists
from nmlightning.name_patterns import matches, some, unmatched


def test_matches_takes_any_pattern_by_case() -> None:
    assert matches("layer1.conv.weight", ["head.*", "layer1.*"])
    assert not matches("layer1.conv.weight", ["layer1", "*.Weight"])
    assert not matches("layer1.conv.weight", [])


def test_unmatched_returns_the_first_pattern_without_a_name() -> None:
    assert unmatched(["a*", "c", "d"], ["ab", "b"]) == "c"
    assert unmatched(["a*"], ["ab", "b"]) is None
    assert unmatched([], []) is None


def test_some_counts_the_names_left_out() -> None:
    assert some([]) == "nothing"
    assert some(["a", "b"], 2) == "a, b"
    assert some(iter("abcd"), 2) == "a, b and 2 more"


@pytest.mark.parametrize(
    ("value", "message"),
    [("a*", r"include is a list, got the string 'a\*': write \['a\*'\]"), (3, "strings, got 3")],
)
def test_check_lists_refuses_a_string_and_numbers(value: object, message: str) -> None:
    check_lists(include=["a*"], exclude=())
    with pytest.raises(InputError, match=message):
        check_lists(include=value)
