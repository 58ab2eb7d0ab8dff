import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from built_kernels import load_kernels
from nmlightning.errors import InputError
from nmlightning.kernels.dispatch import weight_kernels
from nmlightning.weights.channel_norms import channel_norms
from nmlightning.weights.history import NormHistory
from nmlightning.weights.layer_weights import find_layer_weights
from nmlightning.weights.recorder import Recorder
from nmlightning.weights.recording_file import (
    FILE_NAME,
    FORMAT,
    VERSION,
    find_recording,
    record_type,
)
from two_epochs import assert_same, make_history


def test_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = make_history()
    history.save(tmp_path / FILE_NAME)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        history.until(5).save(tmp_path / FILE_NAME)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert_same(NormHistory.load(tmp_path), history)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    file = tmp_path / FILE_NAME
    make_history().save(file)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=f"{FILE_NAME} is truncated or not a safetensors file"):
        NormHistory.load(file)


@pytest.mark.parametrize("names", ['["a"]', "[" * 100_000])
@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F4", "I16"])
def test_odd_dtypes_and_metadata_are_refused(tmp_path: Path, dtype: str, names: str) -> None:
    steps = {"dtype": dtype, "shape": [2], "data_offsets": [0, {"BF16": 4, "F4": 1}.get(dtype, 2)]}
    metadata = {"format": FORMAT, "version": str(VERSION), "names": names, "provenance": "{}"}
    header = json.dumps({"steps": steps, "__metadata__": metadata}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(steps["data_offsets"][1])
    (tmp_path / FILE_NAME).write_bytes(content)
    # Numpy lacks all but the last, and with ml_dtypes imported, as onnx does, has the first.
    with pytest.raises(InputError, match=f"{FILE_NAME} is (damaged|.*not a safetensors file)"):
        NormHistory.load(tmp_path)


def write_runs(folder: Path, *provenances: dict[str, Any]) -> list[Path]:
    """Write the recordings of an experiment's runs, each later than the one before it."""
    files = [folder / f"version_{number}" / FILE_NAME for number in range(len(provenances))]
    for time, (file, provenance) in enumerate(zip(files, provenances, strict=True)):
        NormHistory.from_arrays({"w": [[1.0]]}, [1], [0], provenance=provenance).save(file)
        os.utime(file, (time, time))
    return files


def test_find_recording_by_seed(tmp_path: Path) -> None:
    _, second, third = write_runs(tmp_path, {"seed": 1}, {"seed": 2}, {"seed": 1})
    assert find_recording(second, 3) == second
    assert find_recording(second.parent, 3) == second
    assert find_recording(tmp_path, 2) == second
    assert find_recording(tmp_path, 1) == third
    with pytest.raises(InputError, match=r"seed 3, only with 1, 2: run it with that seed, or name"):
        find_recording(tmp_path, 3)
    with pytest.raises(InputError, match=r"version_7: run the experiment that makes it first"):
        find_recording(tmp_path / "version_7", 1)


def test_find_recording_prefers_finished_runs(tmp_path: Path) -> None:
    done, killed = {"seed": 1, "finished": True}, {"seed": 1, "finished": False}
    files = write_runs(tmp_path, done, done, killed, {"seed": 2}, killed)
    assert find_recording(tmp_path, 1) == files[1]
    for file in files[:2]:
        file.unlink()
    assert find_recording(tmp_path, 1) == files[4]
    assert find_recording(tmp_path, 2) == files[3]


def test_find_recording_skips_damaged_files(tmp_path: Path) -> None:
    files = write_runs(tmp_path, {"seed": 1}, {"seed": 1})
    files[1].write_bytes(files[1].read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"version_1.* is truncated or .*; it is skipped"):
        assert find_recording(tmp_path, 1) == files[0]
    files[0].unlink()
    with (
        pytest.warns(UserWarning, match="is skipped"),
        pytest.raises(InputError, match=r"There is no recording of weight norms at .* that can be"),
    ):
        find_recording(tmp_path, 1)


def test_files_without_a_recording_are_refused(tmp_path: Path) -> None:
    file = tmp_path / FILE_NAME
    with pytest.raises(InputError, match=r"is a pickle, .* and use NormHistory.from_arrays"):
        NormHistory.load("run.pkl")
    with pytest.raises(InputError, match=f"no recording of weight norms at .*{FILE_NAME}"):
        NormHistory.load(tmp_path)
    save_file({"w": np.ones(3)}, file)
    with pytest.raises(InputError, match="a safetensors file, but no recording"):
        NormHistory.load(file)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"version": "2"}, "has version 2 of the format, of which this release reads 1"),
        ({"names": "[]]"}, "is damaged"),
        ({"names": '["a.weight", "c.weight"]'}, "is damaged: 'norms/c.weight' is missing"),
        ({"provenance": "{"}, "is damaged"),
        ({"provenance": "[]"}, r"cannot be used: provenance is a mapping of plain data, got \[\]"),
        ({"provenance": "null"}, "cannot be used: provenance is a mapping of plain data, got None"),
        ({"names": "5"}, "is damaged"),
        ({"names": "[5]"}, "is damaged"),
    ],
)
def test_damaged_metadata_is_refused(
    tmp_path: Path, metadata: dict[str, str], message: str
) -> None:
    file = tmp_path / FILE_NAME
    make_history().save(file)
    good = {"format": "nmlightning weight norms", "version": "1", "names": "[]", "provenance": "{}"}
    save_file(load_file(file), file, good | metadata)
    with pytest.raises(InputError, match=message):
        NormHistory.load(file)


NET = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Linear(5, 3))


def grow(file: Path, saves: int, start: int = 0, earlier: NormHistory | None = None) -> Recorder:
    """Record and save again and again; the file is closed as that of a run that was stopped."""
    recorder = Recorder(find_layer_weights(NET), {"seed": 3, "config": "a: 1\n" * 200}, earlier)
    for step in range(start, start + saves):
        recorder.record(step, step // 5, {})
        recorder.save(file)
    return recorder


def written_by(operation: Callable[[], object]) -> int:
    def count() -> int:
        return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])

    before = count()
    operation()
    return count() - before


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts by Linux")
@pytest.mark.parametrize("saves", [3, 40, 400])
def test_growing_recording_writes_nothing_twice(tmp_path: Path, saves: int) -> None:
    file = tmp_path / FILE_NAME
    written = written_by(lambda: grow(file, saves))
    assert written <= 1.1 * file.stat().st_size
    assert NormHistory.load(file).steps.tolist() == list(range(saves))
    assert NormHistory.load(file).norms["0.weight"].base is not None, "it is in the file"
    assert file.stat().st_mode & 0o077 == 0o077 & ~os.umask(os.umask(0o022)) & 0o666


def test_torn_tail_costs_the_torn_records(tmp_path: Path) -> None:
    file = tmp_path / FILE_NAME
    whole = grow(file, 7)
    whole.end_epoch()
    whole.finish()
    for _ in range(2):
        whole.save(file)
    content = file.read_bytes()
    size = record_type([4, 3]).itemsize
    history = NormHistory.load(file)
    assert history.provenance["finished"] is True
    assert (len(history), history.provenance["steps_per_epoch"]) == (7, 2)
    for cut, left in ((1, 7), (size, 7), (size + 1, 6), (3 * size, 5), (7 * size - 1, 1)):
        file.write_bytes(content[:-cut])
        says = pytest.warns(UserWarning, match=f"{file} ends in {-cut % size} bytes of an incom")
        with says if cut % size else nullcontext():
            torn = NormHistory.load(file)
        assert (len(torn), torn.provenance["finished"]) == (left, False)
    file.write_bytes(content[: -7 * size - 1])
    with pytest.raises(InputError, match="is truncated or not a safetensors file"):
        NormHistory.load(file)
    file.write_bytes(content[: -3 * size - 1])
    with pytest.warns(UserWarning, match="an incomplete record, which is left out"):
        grow(file, 3, 4, NormHistory.load(file, finite=False))
    assert NormHistory.load(file).steps.tolist() == list(range(7))


@pytest.mark.parametrize("grown", [True, False])
def test_flipped_bits_are_refused_or_harmless(tmp_path: Path, grown: bool) -> None:
    file = tmp_path / FILE_NAME
    history = grow(file, 6).history()
    if not grown:
        history.save(file)
    content = file.read_bytes()
    generator = np.random.default_rng(1)
    refused = 0
    for bit in generator.choice(8 * len(content), 200, replace=False):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            found = NormHistory.load(file)
        except InputError:
            refused += 1
            continue
        assert_same(found, history)
    assert refused > 150


@pytest.mark.parametrize("grown", [True, False])
def test_no_flip_in_the_head_or_the_last_record_goes_unnoticed(tmp_path: Path, grown: bool) -> None:
    file = tmp_path / FILE_NAME
    recorder = grow(file, 2)
    recorder.finish()
    recorder.save(file)
    if not grown:
        NormHistory.load(file).save(file)
    content = file.read_bytes()
    places = [
        content.index(word) + i
        for word in (b"crc32", b"version", b"F32")[: 2 + (not grown)]
        for i in range(3)
    ]
    for place in [*places, len(content) - 9]:
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            file.write_bytes(flipped)
            with pytest.raises(InputError, match=FILE_NAME):
                NormHistory.load(file)


def test_another_dtype_in_the_head_is_refused(tmp_path: Path) -> None:
    file = tmp_path / FILE_NAME
    make_history().save(file)
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(InputError, match="is damaged: its checksum differs"):
        NormHistory.load(file)


@pytest.mark.parametrize("read", [NormHistory.load, lambda path: find_recording(Path(path), 1)])
def test_a_name_that_is_too_long_is_refused(read: Callable[[str], Any]) -> None:
    with pytest.raises(InputError, match="x cannot be read: File name too long"):
        read("x" * 300)


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(3, 4, 2, groups=1), nn.Linear(4, 5))


def change(model: nn.Module) -> None:
    with torch.no_grad():
        for q in model.parameters():
            q.mul_(1.5)


@pytest.mark.parametrize("backend", ["formula", "auto"])
def test_recorder_records(backend: Any) -> None:
    model = make_model()
    weights = find_layer_weights(model)
    if backend == "auto":
        load_kernels()
    kernels = weight_kernels if backend == "auto" else None
    recorder = Recorder(weights, {"seed": 3}, kernels=kernels)
    assert recorder.last_step == -1
    rates = {id(weights[0].parameter): (0.1, 5e-4)}
    expected = []
    for step, epoch in ((0, 0), (4, 0), (8, 1)):
        recorder.record(step, epoch, rates)
        expected.append([channel_norms(w.parameter, layout=w.layout) for w in weights])
        change(model)
        recorder.record(step, epoch + 1, {})  # at the same step: not taken
        if step == 4:
            recorder.history()  # bringing some records to the CPU changes nothing
    history = recorder.history()
    assert recorder.last_step == 8
    assert history.steps.tolist() == [0, 4, 8]
    assert history.epochs.tolist() == [0, 0, 1]
    assert history.provenance == {"seed": 3, "finished": False}
    recorder.end_epoch()
    recorder.finish()
    assert recorder.history().provenance == {"seed": 3, "finished": True, "steps_per_epoch": 4}
    for column, (name, values) in enumerate(history.norms.items()):
        assert name == weights[column].name
        rows = torch.stack([row[column] for row in expected])
        np.testing.assert_allclose(values, rows, rtol=0 if backend == "formula" else 2e-7)
    np.testing.assert_array_equal(history.learning_rates, [[0.1, np.nan, np.nan]] * 3)
    np.testing.assert_array_equal(history.weight_decays[:, 0], [5e-4] * 3)


def test_recorder_continues_earlier_records(tmp_path: Path) -> None:
    model = make_model()
    weights = find_layer_weights(model)
    recorder = Recorder(weights, {})
    recorder.record(0, 0, {})
    assert [len(norms) for norms in recorder.norms_by_epoch().values()] == [2] * len(weights)
    for step in (1, 2):
        recorder.record(step, 0, {})
    recorder.save(tmp_path / "weight_norms.safetensors")
    earlier = NormHistory.load(tmp_path)
    resumed = Recorder(weights[1:], {}, earlier)
    assert resumed.last_step == 2
    resumed.record(2, 1, {})
    model.get_parameter("1.weight").data *= 2
    resumed.record(3, 1, {})
    history = resumed.history()
    assert list(history.norms) == [weight.name for weight in weights[1:]]
    assert history.steps.tolist() == [0, 1, 2, 3]
    assert history.epochs.tolist() == [0, 0, 0, 1]
    shown = resumed.norms_by_epoch()["1.weight"]
    np.testing.assert_array_equal(shown, history.norms["1.weight"][[0, 2, 3]])
    np.testing.assert_array_equal(history.norms["1.weight"][:3], earlier.norms["1.weight"])
    other = find_layer_weights(nn.Sequential(nn.Conv2d(2, 9, 3)))
    with pytest.raises(InputError, match=r"0.weight has 3 output channels there and 9 here"):
        Recorder(other, {}, earlier)
