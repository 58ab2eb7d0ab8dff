"""NormHistory: its moments, its clock, its arrays and a round trip."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nmlightning.errors import InputError
from nmlightning.weights.history import NormHistory, RecordedClock
from nmlightning.weights.recording_file import FILE_NAME
from two_epochs import STEPS, assert_same, make_history


@pytest.mark.parametrize(("epoch", "record"), [(0, 2), (0.9, 2), (1, 4), (1.5, 4)])
def test_official_place_is_the_end_of_the_same_epoch(epoch: float, record: int) -> None:
    history = make_history()
    assert history.place(epoch=epoch) == (record, record, 0.0)
    np.testing.assert_array_equal(
        history.at(epoch=epoch)["a.weight"], [STEPS[record] + 1, 2 * STEPS[record] + 1]
    )


@pytest.mark.parametrize(("step", "record"), [(0, 2), (9, 2), (10, 4), (19, 4)])
def test_official_place_of_a_step_is_its_epochs(step: int, record: int) -> None:
    """The step after `step` others belongs to this epoch."""
    assert make_history().place(step=step) == (record, record, 0.0)


@pytest.mark.parametrize("step", [0, 1, 5, 7, 10, 13, 20])
def test_interpolation_is_linear_in_steps(step: int) -> None:
    history = make_history()
    by_step = history.at(step=step, align="interpolate")
    np.testing.assert_allclose(by_step["a.weight"], [step + 1, 2 * step + 1], rtol=1e-6)
    by_epoch = history.at(epoch=step / 10, align="interpolate")
    np.testing.assert_allclose(by_epoch["b.weight"], by_step["b.weight"], rtol=1e-6)


def test_interpolation_before_the_first_record_is_the_first() -> None:
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
        ({"epoch": math.inf, "align": "interpolate"}, "epoch is a finite number of at least 0,"),
        ({"epoch": -0.5}, "epoch is a finite number of at least 0, got -0.5"),
        ({"epoch": "1"}, "epoch is a finite number of at least 0, got '1'"),
        ({"step": -1}, "step must be a whole number of at least 0, got -1"),
        ({"step": 1.5, "align": "interpolate"}, "step must be a whole number of at least 0, got 1"),
        ({}, "give either a step or an epoch"),
        ({"step": 1, "epoch": 1}, "give either a step or an epoch"),
        ({"step": 1, "align": "interpolat"}, "Did you mean 'interpolate'?"),
    ],
)
def test_bad_moments_are_refused(moment: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        make_history().at(**moment)


def test_empty_history(tmp_path: Path) -> None:
    empty = NormHistory.from_arrays({"w": np.zeros((0, 3))}, [], [])
    empty.save(tmp_path / FILE_NAME)
    assert_same(NormHistory.load(tmp_path), empty)
    assert repr(empty) == "NormHistory(0 records of 1 weights)"
    for align in ("official", "interpolate"):
        with pytest.raises(InputError, match="is empty, so it does not reach"):
            empty.at(epoch=0, align=align)
        with pytest.raises(InputError, match="is empty, so it does not reach"):
            empty.at(step=0, align=align)


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    history = make_history()
    file = tmp_path / "deeper" / FILE_NAME
    history.save(file)
    assert_same(NormHistory.load(file), history)
    assert_same(NormHistory.load(file.parent), history)
    assert repr(history) == "NormHistory(5 records of 2 weights, steps 0 to 20)"
    assert [path.name for path in file.parent.iterdir()] == [FILE_NAME]


def test_unknown_rates_are_nan(tmp_path: Path) -> None:
    history = make_history(learning_rates=None, weight_decays=None, provenance=None)
    assert np.isnan(history.learning_rates).all()
    history.save(tmp_path / FILE_NAME)
    assert_same(NormHistory.load(tmp_path), history)


@pytest.mark.parametrize(("step", "kept"), [(0, 1), (7, 2), (10, 3), (99, 5)])
def test_until_keeps_earlier_records(step: int, kept: int) -> None:
    history, whole = make_history().until(step), make_history()
    assert len(history) == kept
    np.testing.assert_array_equal(history.steps, STEPS[:kept])
    np.testing.assert_array_equal(history.norms["b.weight"], whole.norms["b.weight"][:kept])
    np.testing.assert_array_equal(history.learning_rates, whole.learning_rates[:kept])
    assert history.provenance == whole.provenance


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_load_refuses_nonfinite_norms(tmp_path: Path, value: float) -> None:
    history = make_history()
    history.norms["b.weight"][3:, 1] = value
    history.save(tmp_path / FILE_NAME)
    with pytest.raises(InputError, match=r"b.weight are not finite from record 3 \(epoch 1\) on"):
        NormHistory.load(tmp_path)
    assert_same(NormHistory.load(tmp_path, finite=False), history)


def test_check_weights_names_the_difference() -> None:
    history = make_history()
    history.check_weights({"b.weight": 3})
    with pytest.raises(InputError, match=r"no 'b.weigth'. Did you mean 'b.weight'\? It holds a.w"):
        history.check_weights({"a.weight": 2, "b.weigth": 3})
    with pytest.raises(InputError, match=r"b.weight has 3 output channels there and 4 here"):
        history.check_weights({"b.weight": 4})


def make_clock(
    steps: list[int], epochs: list[int], steps_per_epoch: int | None = None
) -> RecordedClock:
    return RecordedClock(np.array(steps), np.array(epochs), steps_per_epoch)


@pytest.mark.parametrize(
    ("steps", "epochs", "steps_per_epoch", "covered"),
    [
        ([], [], None, 0),
        ([0], [0], None, 0),
        ([0, 5, 10], [0, 0, 1], None, 2),
        ([0, 5, 10], [0, 0, 1], 5, 2),
        ([0, 5, 7], [0, 0, 1], None, 1.4),
        ([0, 5, 7], [0, 0, 1], 2, 2),  # the last epoch was over, and shorter
        ([0, 2], [0, 0], 5, 0.4),
        ([0, 2], [0, 0], None, 1),
        ([5, 10], [0, 1], None, 2),
        ([5, 10, 15], [1, 1, 2], None, 3),  # what a run recorded from its second epoch on
    ],
)
def test_clock_covers_epochs(
    steps: list[int], epochs: list[int], steps_per_epoch: int | None, covered: float
) -> None:
    assert make_clock(steps, epochs, steps_per_epoch).covered == pytest.approx(covered)


def test_clock_of_a_run_stopped_inside_an_epoch() -> None:
    clock = make_clock([0, 5, 7], [0, 0, 1])
    assert [clock.steps_in(epoch) for epoch in (0, 1)] == [5, 2]
    assert [clock.length_of(epoch) for epoch in (0, 1)] == [5, 5]
    assert [clock.step_at(epoch) for epoch in (0.2, 1, 1.2, 2)] == pytest.approx([1, 5, 6, 10])
    with pytest.raises(InputError, match="does not reach step 10"):
        clock.around(clock.step_at(2))


def test_clock_of_a_run_recorded_late() -> None:
    clock = make_clock([5, 10, 15], [1, 1, 2])
    assert [clock.step_at(epoch) for epoch in (1, 1.2, 2)] == pytest.approx([5, 6, 10])
    with pytest.raises(InputError, match="does not reach epoch 0"):
        clock.step_at(0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": [0, 0, 0, 1]}, r"5 steps, but epochs of shape \(4,\)"),
        ({"steps": [0, 5, 5, 15, 20]}, "steps do not increase"),
        ({"steps": [-1, 5, 10, 15, 20]}, "steps do not increase"),
        ({"epochs": [0, 0, 1, 0, 1]}, "epochs run backwards"),
        ({"norms": {"a": np.ones((4, 2)), "b": np.ones((5, 1))}}, r"a has shape \(4, 2\), exp"),
        ({"norms": {"a": np.ones(5), "b": np.ones((5, 1))}}, r"a has shape \(5,\), expected"),
        ({"norms": {"a": np.ones((5, 1)), "b": -np.ones((5, 1))}}, "b has a negative norm in rec"),
        ({"learning_rates": np.ones((5, 3))}, r"rates has shape \(5, 3\), expected \(5, 2"),
        ({"norms": {"a": [[1.0, 2.0], [3.0]]}}, "a holds no array of numbers"),
        ({"norms": {"a": [["x"]]}}, "a holds no array of numbers"),
        ({"norms": {"a": None}}, "a holds no array of numbers"),
        ({"norms": [[1.0]]}, "norms is a mapping from names of weights to arrays, got a list"),
        ({"norms": {3: np.ones((5, 1))}}, "norms has the name 3, which is not a string"),
        ({"steps": [0.0, 5.0, 10.5, 15.0, 20.0]}, "steps are whole numbers, got 10.5"),
        ({"epochs": [0.2, 0.2, 0.2, 1.7, 1.7]}, "epochs are whole numbers, got 0.2"),
        ({"steps": [0.0, 5.0, np.nan, 15.0, 20.0]}, "steps are whole numbers, got nan"),
        ({"steps": ["0", "5", "10", "15", "20"]}, "steps holds no array of numbers"),
        ({"steps": 5}, r"steps has shape \(\), expected \(records,\)"),
        ({"learning_rates": [["x"]]}, "learning_rates holds no array of numbers"),
        ({"provenance": {"seed": {1, 2}}}, "provenance is a mapping of plain data, got {'seed"),
        ({"provenance": [1]}, r"provenance is a mapping of plain data, got \[1\]"),
    ],
)
def test_bad_arrays_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make_history(**changes)
    assert "\n" not in str(caught.value)


def test_whole_numbers_in_floats_become_integers() -> None:
    history = make_history(steps=[0.0, 5.0, 10.0, 15.0, 20.0])
    assert history.steps.dtype == np.int64
    assert_same(history, make_history())
