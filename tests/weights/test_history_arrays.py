from typing import Any

import numpy as np
import pytest

from nmlightning.errors import InputError
from two_epochs import assert_same, make_history


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": [0, 0, 0, 1]}, r"5 steps, but epochs of shape \(4,\)"),
        ({"steps": [0, 5, 5, 15, 20]}, "steps do not increase"),
        ({"steps": [-1, 5, 10, 15, 20]}, "steps do not increase"),
        ({"epochs": [0, 0, 1, 0, 1]}, "epochs run backwards"),
        ({"norms": {"a": np.ones((4, 2)), "b": np.ones((5, 1))}}, r"a has shape \(4, 2\), exp"),
        (
            {"norms": {"a": np.ones(5), "b": np.ones((5, 1))}},
            r"a has shape \(5,\), expected \(5, c",
        ),
        ({"norms": {"a": np.ones((5, 1)), "b": -np.ones((5, 1))}}, "b has a negative norm in rec"),
        (
            {"learning_rates": np.ones((5, 3))},
            r"learning_rates has shape \(5, 3\), expected \(5, 2",
        ),
        ({"weight_decays": np.ones(5)}, r"weight_decays has shape \(5,\), expected \(5, 2\)"),
    ],
)
def test_arrays_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_history(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norms": {"a": [[1.0, 2.0], [3.0]]}}, "a holds no array of numbers"),
        ({"norms": {"a": [["x"]]}}, "a holds no array of numbers"),
        ({"norms": {"a": [[1j]]}}, "a holds no array of numbers"),
        ({"norms": {"a": None}}, "a holds no array of numbers"),
        ({"norms": [[1.0]]}, "norms is a mapping from names of weights to arrays, got a list"),
        ({"norms": {3: np.ones((5, 1))}}, "norms has the name 3, which is no string"),
        ({"steps": [0.0, 5.0, 10.5, 15.0, 20.0]}, "steps are whole numbers, got 10.5"),
        ({"epochs": [0.2, 0.2, 0.2, 1.7, 1.7]}, "epochs are whole numbers, got 0.2"),
        ({"steps": [0.0, 5.0, np.nan, 15.0, 20.0]}, "steps are whole numbers, got nan"),
        ({"steps": [0.0, 5.0, 10.0, 15.0, np.inf]}, "steps are whole numbers, got inf"),
        ({"steps": ["0", "5", "10", "15", "20"]}, "steps holds no array of numbers"),
        ({"steps": 5}, r"steps has shape \(\), expected \(records,\)"),
        ({"steps": [[0, 5, 10, 15, 20]]}, r"steps has shape \(1, 5\), expected \(records,\)"),
        ({"learning_rates": [["x"]]}, "learning_rates holds no array of numbers"),
        ({"provenance": {"seed": {1, 2}}}, "provenance is a mapping of plain data, got {'seed"),
        ({"provenance": [1]}, r"provenance is a mapping of plain data, got \[1\]"),
    ],
)
def test_what_is_no_array(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make_history(**changes)
    assert "\n" not in str(caught.value)


def test_whole_numbers_in_floats() -> None:
    history = make_history(steps=[0.0, 5.0, 10.0, 15.0, 20.0])
    assert history.steps.dtype == np.int64
    assert_same(history, make_history())
