"""Test that a YAML text is read, or refused in one line, in a moment."""

import time
from typing import Any

import pytest
import yaml

from nmlightning.errors import InputError
from nmlightning.yaml_text import MAX_DEPTH, check_yaml, load_yaml

NINE = ["k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7", "k8"]
LISTS = "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{f'*a{n}, ' * 9}]\n" for n in range(12))
MAPS = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n + 1}: &a{n + 1} {{{', '.join(f'{k}: *a{n}' for k in NINE)}}}\n" for n in range(12)
)
REFUSED = {
    LISTS: "more than 100,000 values in line 6",
    MAPS: "more than 100,000 values in line 6",
    "a: &a [1, *a]": r"\*a refers to itself in line 1",
    "a: &a\n  b: *a": r"\*a refers to itself in line 2",
    "a: " + "[" * 3000 + "]" * 3000: f"more than {MAX_DEPTH} levels are nested in line 1",
    "a:\n  b: !!set {c, d}": "a value of type 'set' in line 2",
    "a: !!python/object:os.x {}": "a value of type 'python/object:os.x'",
    "a: 2001-99-99": ": month must be in 1..12",
    "a: !!bool x": ": 'x'",
    "a: " + "9" * 5000: "a number of 5000 digits in line 1",
    "a: 1\nb: {c: 1,\n c: 2}": "the key 'c' is given twice in line 3",
    'a: "x\\0"': "a NUL character in line 1",
    "a: *b": "found undefined alias in line 1",
    "a: 1\n---\nb: 1": "but found another document in line 2",
    "? [1, 2]\n: 3": "found unhashable key",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:20])
def test_load_yaml_refuses(text: str) -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match=f"^x.yaml is not YAML.*{REFUSED[text]}"):
        load_yaml(text, "x.yaml")
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    "text",
    ["", "a: &a [1, 2]\nb: {c: *a, <<: {d: 1}}", "x: 1e-4\ny: .nan\nz: 2001-01-01", "9" * 308],
)
def test_load_yaml_reads_as_yaml_does(text: str) -> None:
    assert str(load_yaml(text, "")) == str(yaml.safe_load(text))
    check_yaml(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("!!python/object:a.B {c: 1}", "tag:yaml.org,2002:python/object:a.B"), ("!x y", "!x")],
)
def test_load_yaml_takes_the_name_of_a_type(text: str, value: Any) -> None:
    assert load_yaml(f"a: {text}", "", objects=True) == {"a": value}
