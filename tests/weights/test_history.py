import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from nmlightning.errors import InputError
from nmlightning.weights.history import NormHistory
from nmlightning.weights.recording_file import FILE_NAME, find_recording

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


def test_a_failed_save_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = make_history()
    history.save(tmp_path / FILE_NAME)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        history.until(5).save(tmp_path / FILE_NAME)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert_same(NormHistory.load(tmp_path), history)


@pytest.mark.parametrize(("step", "kept"), [(0, 1), (7, 2), (10, 3), (99, 5)])
def test_until(step: int, kept: int) -> None:
    history, whole = make_history().until(step), make_history()
    assert len(history) == kept
    np.testing.assert_array_equal(history.steps, STEPS[:kept])
    np.testing.assert_array_equal(history.norms["b.weight"], whole.norms["b.weight"][:kept])
    np.testing.assert_array_equal(history.learning_rates, whole.learning_rates[:kept])
    assert history.provenance == whole.provenance


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(tmp_path: Path, share: float) -> None:
    file = tmp_path / FILE_NAME
    make_history().save(file)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=f"{FILE_NAME} is truncated or no safetensors file"):
        NormHistory.load(file)


def test_find_a_recording_by_its_seed(tmp_path: Path) -> None:
    for version, seed in enumerate((1, 2, 1)):
        history = NormHistory.from_arrays({"w": [[1.0]]}, [1], [0], provenance={"seed": seed})
        history.save(tmp_path / f"version_{version}" / FILE_NAME)
        os.utime(tmp_path / f"version_{version}" / FILE_NAME, (version, version))
    second = tmp_path / "version_1" / FILE_NAME
    assert find_recording(second, 3) == second
    assert find_recording(second.parent, 3) == second
    assert find_recording(tmp_path, 2) == second
    assert find_recording(tmp_path, 1) == tmp_path / "version_2" / FILE_NAME
    with pytest.raises(InputError, match=r"seed 3, only with 1, 2: run it with that seed, or name"):
        find_recording(tmp_path, 3)
    with pytest.raises(InputError, match=r"version_7: run the experiment that makes it first"):
        find_recording(tmp_path / "version_7", 1)


def write_runs(folder: Path, *provenances: dict[str, Any]) -> list[Path]:
    """Write the recordings of an experiment's runs, each later than the one before it."""
    files = [folder / f"version_{number}" / FILE_NAME for number in range(len(provenances))]
    for time, (file, provenance) in enumerate(zip(files, provenances, strict=True)):
        NormHistory.from_arrays({"w": [[1.0]]}, [1], [0], provenance=provenance).save(file)
        os.utime(file, (time, time))
    return files


def test_of_several_runs_the_latest_that_finished_is_found(tmp_path: Path) -> None:
    done, killed = {"seed": 1, "finished": True}, {"seed": 1, "finished": False}
    files = write_runs(tmp_path, done, done, killed, {"seed": 2}, killed)
    assert find_recording(tmp_path, 1) == files[1]
    for file in files[:2]:
        file.unlink()
    assert find_recording(tmp_path, 1) == files[4]
    assert find_recording(tmp_path, 2) == files[3]


def test_damaged_runs_are_passed_over(tmp_path: Path) -> None:
    files = write_runs(tmp_path, {"seed": 1}, {"seed": 1})
    files[1].write_bytes(files[1].read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"version_1.* is truncated or .*; it is passed over"):
        assert find_recording(tmp_path, 1) == files[0]
    files[0].unlink()
    with (
        pytest.warns(UserWarning, match="is passed over"),
        pytest.raises(InputError, match=r"There is no recording of weight norms at .* that can be"),
    ):
        find_recording(tmp_path, 1)


def test_files_that_are_no_recording(tmp_path: Path) -> None:
    file = tmp_path / FILE_NAME
    with pytest.raises(InputError, match=f"no recording of weight norms at .*{FILE_NAME}"):
        NormHistory.load(tmp_path)
    save_file({"w": np.ones(3)}, file)
    with pytest.raises(InputError, match="a safetensors file, but no recording"):
        NormHistory.load(file)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"version": "2"}, "has version 2 of the format, and this release reads 1"),
        ({"names": "[]]"}, "is damaged"),
        ({"names": '["a.weight", "c.weight"]'}, "is damaged: 'norms/c.weight' is missing"),
        ({"provenance": "{"}, "is damaged"),
        ({"provenance": "[]"}, r"cannot be used: provenance is a mapping of plain data, got \[\]"),
        ({"provenance": "null"}, "cannot be used: provenance is a mapping of plain data, got None"),
        ({"names": "5"}, "is damaged"),
        ({"names": "[5]"}, "is damaged"),
    ],
)
def test_damaged_metadata(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    file = tmp_path / FILE_NAME
    make_history().save(file)
    good = {"format": "nmlightning weight norms", "version": "1", "names": "[]", "provenance": "{}"}
    save_file(load_file(file), file, good | metadata)
    with pytest.raises(InputError, match=message):
        NormHistory.load(file)


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


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.int64(3), r"steps has shape \(\), expected \(records,\)"),
        (np.array([0.2, 5, 10, 15, 20]), "steps are whole numbers, got 0.2"),
    ],
)
def test_files_with_another_clock(array: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / FILE_NAME
    make_history().save(file)
    with safe_open(file, framework="np") as content:
        metadata = content.metadata()
    save_file({**load_file(file), "steps": np.asarray(array)}, file, metadata)
    with pytest.raises(InputError, match=f"{FILE_NAME} cannot be used: {message}"):
        NormHistory.load(file)


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
