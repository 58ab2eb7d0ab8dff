import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nmlightning.errors import InputError
from nmlightning.weights.history import NormHistory
from nmlightning.weights.recording_file import FILE_NAME
from two_epochs import STEPS, assert_same, make_history


@pytest.mark.parametrize(("epoch", "record"), [(0, 2), (0.9, 2), (1, 4), (1.5, 4)])
def test_official_is_the_end_of_the_same_epoch(epoch: float, record: int) -> None:
    history = make_history()
    assert history.place(epoch=epoch) == (record, record, 0.0)
    np.testing.assert_array_equal(
        history.at(epoch=epoch)["a.weight"], [STEPS[record] + 1, 2 * STEPS[record] + 1]
    )


@pytest.mark.parametrize(("step", "record"), [(0, 2), (9, 2), (10, 4), (19, 4)])
def test_official_by_step(step: int, record: int) -> None:
    """The step after `step` others belongs to this epoch."""
    assert make_history().place(step=step) == (record, record, 0.0)


@pytest.mark.parametrize("step", [0, 1, 5, 7, 10, 13, 20])
def test_interpolation_is_linear_in_steps(step: int) -> None:
    history = make_history()
    by_step = history.at(step=step, align="interpolate")
    np.testing.assert_allclose(by_step["a.weight"], [step + 1, 2 * step + 1], rtol=1e-6)
    by_epoch = history.at(epoch=step / 10, align="interpolate")
    np.testing.assert_allclose(by_epoch["b.weight"], by_step["b.weight"], rtol=1e-6)


def test_before_the_first_record_it_is_the_first() -> None:
    history = make_history(steps=[10, 20, 30, 40, 50], epochs=[0, 1, 2, 3, 4])
    assert history.place(step=3, align="interpolate") == (0, 0, 0.0)
    assert history.place(epoch=0.5, align="interpolate") == (0, 0, 0.0)
    assert history.place(epoch=1.5, align="interpolate") == (0, 1, 0.5)
    assert history.place(epoch=5, align="interpolate") == (4, 4, 0.0)


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        ({"step": 20}, "does not reach step 20: it covers steps 0 to 20, epochs 0 to 1"),
        ({"epoch": 2}, "does not reach epoch 2"),
        ({"step": 21, "align": "interpolate"}, "does not reach step 21"),
        ({"epoch": 2.1, "align": "interpolate"}, "does not reach epoch 2"),
        ({"epoch": math.nan}, "epoch is a finite number of at least 0, got nan"),
        (
            {"epoch": math.inf, "align": "interpolate"},
            "epoch is a finite number of at least 0, got",
        ),
        ({"epoch": -0.5}, "epoch is a finite number of at least 0, got -0.5"),
        ({"epoch": "1"}, "epoch is a finite number of at least 0, got '1'"),
        ({"step": -1}, "step must be a whole number of at least 0, got -1"),
        ({"step": 1.5, "align": "interpolate"}, "step must be a whole number of at least 0, got 1"),
        ({}, "give either a step or an epoch"),
        ({"step": 1, "epoch": 1}, "give either a step or an epoch"),
        ({"step": 1, "align": "interpolat"}, "Did you mean 'interpolate'?"),
    ],
)
def test_moments_that_it_does_not_have(moment: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        make_history().at(**moment)


def test_an_empty_history(tmp_path: Path) -> None:
    empty = NormHistory.from_arrays({"w": np.zeros((0, 3))}, [], [])
    empty.save(tmp_path / FILE_NAME)
    assert_same(NormHistory.load(tmp_path), empty)
    assert repr(empty) == "NormHistory(0 records of 1 weights)"
    for align in ("official", "interpolate"):
        with pytest.raises(InputError, match="is empty, so it does not reach"):
            empty.at(epoch=0, align=align)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="is empty, so it does not reach"):
            empty.at(step=0, align=align)  # type: ignore[arg-type]


def test_round_trip(tmp_path: Path) -> None:
    history = make_history()
    file = tmp_path / "deeper" / FILE_NAME
    history.save(file)
    assert_same(NormHistory.load(file), history)
    assert_same(NormHistory.load(file.parent), history)
    assert repr(history) == "NormHistory(5 records of 2 weights, steps 0 to 20)"
    assert [path.name for path in file.parent.iterdir()] == [FILE_NAME]


def test_rates_that_are_unknown(tmp_path: Path) -> None:
    history = make_history(learning_rates=None, weight_decays=None, provenance=None)
    assert np.isnan(history.learning_rates).all()
    history.save(tmp_path / FILE_NAME)
    assert_same(NormHistory.load(tmp_path), history)


@pytest.mark.parametrize(("step", "kept"), [(0, 1), (7, 2), (10, 3), (99, 5)])
def test_until(step: int, kept: int) -> None:
    history, whole = make_history().until(step), make_history()
    assert len(history) == kept
    np.testing.assert_array_equal(history.steps, STEPS[:kept])
    np.testing.assert_array_equal(history.norms["b.weight"], whole.norms["b.weight"][:kept])
    np.testing.assert_array_equal(history.learning_rates, whole.learning_rates[:kept])
    assert history.provenance == whole.provenance


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_run_that_diverged(tmp_path: Path, value: float) -> None:
    history = make_history()
    history.norms["b.weight"][3:, 1] = value
    history.save(tmp_path / FILE_NAME)
    with pytest.raises(InputError, match=r"b.weight are not finite from record 3 \(epoch 1\) on"):
        NormHistory.load(tmp_path)
    assert_same(NormHistory.load(tmp_path, finite=False), history)


def test_check_weights() -> None:
    history = make_history()
    history.check_weights({"b.weight": 3})
    with pytest.raises(InputError, match=r"no 'b.weigth'. Did you mean 'b.weight'\? It holds a.w"):
        history.check_weights({"a.weight": 2, "b.weigth": 3})
    with pytest.raises(InputError, match=r"b.weight has 3 output channels there and 4 here"):
        history.check_weights({"b.weight": 4})
