"""A history of two epochs, for the tests of histories, of their arrays and of their files."""

from typing import Any

import numpy as np

from nmlightning.weights.history import NormHistory

STEPS = [0, 5, 10, 15, 20]
EPOCHS = [0, 0, 0, 1, 1]


def make_history(**changes: Any) -> NormHistory:
    """Two epochs of ten steps, recorded at the start and every five steps."""
    arguments: dict[str, Any] = {
        "norms": {
            "a.weight": np.outer(STEPS, [1.0, 2.0]) + 1,
            "b.weight": np.outer(STEPS, [0.5, 0.0, 1.0]) + 2,
        },
        "steps": STEPS,
        "epochs": EPOCHS,
        "learning_rates": np.linspace(0.1, 0.01, 10).reshape(5, 2),
        "weight_decays": np.full((5, 2), 5e-4),
        "provenance": {"seed": 1, "versions": {"torch": "2.11.0"}},
    }
    return NormHistory.from_arrays(**arguments | changes)


def assert_same(one: NormHistory, other: NormHistory) -> None:
    assert list(one.norms) == list(other.norms)
    assert one.provenance == other.provenance
    for name in ("steps", "epochs", "learning_rates", "weight_decays"):
        first, second = getattr(one, name), getattr(other, name)
        np.testing.assert_array_equal(first, second)
        assert first.dtype == second.dtype
    for name, values in one.norms.items():
        np.testing.assert_array_equal(values, other.norms[name])
        assert values.dtype == other.norms[name].dtype == np.float32
