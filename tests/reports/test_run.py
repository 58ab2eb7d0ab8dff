import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from nmlightning.errors import InputError
from nmlightning.reports.run import (
    find_runs,
    flatten_settings,
    read_event_file,
    read_run,
    read_saved_config,
)

CSV = """epoch,step,train/loss,val/top1
0,4,1.5,
0,9,,0.5
1,14,1.25,
1,19,,0.75
"""


def test_read_run_reads_events_config_and_norms(make_run: Callable[..., Path]) -> None:
    run = read_run(make_run(config={"seed_everything": 7, "a": {"b": 1}}, norms={"w": [[1], [2]]}))
    assert run.name == "experiment"
    assert run.seed == 7
    assert run.settings == {"a.b": 1}
    assert run.seconds == 30
    assert run.scalars["val/top1"].values.tolist() == [0.5, 0.75]
    assert run.epochs_at(run.scalars["val/top1"].steps).tolist() == [1, 2]
    assert run.norms.norms["w"].tolist() == [[1], [2]]


def test_read_run_reads_a_csv(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(CSV)
    run = read_run(tmp_path)
    assert run.name == tmp_path.name
    assert run.seed is None
    assert run.settings == {}
    assert run.norms is None
    assert math.isnan(run.seconds)
    assert run.scalars["val/top1"].steps.tolist() == [9, 19]
    assert run.epochs_at(run.scalars["val/top1"].steps).tolist() == [1, 2]


@pytest.mark.parametrize(
    "content",
    [
        b"step,loss\n1%030d,1\n" % 0,
        b"a,b\n1,2\n",
        b"step,loss\n1,x\n",
        b"step,loss\n,1\n",
        b"step,val/top1\n1,\xff\n",
    ],
)
def test_read_run_refuses_a_damaged_csv(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes(content)
    message = r"metrics.csv is damaged, or not of Lightning's CSVLogger"
    with pytest.raises(InputError, match=message):
        read_run(tmp_path)


@pytest.mark.parametrize("kept", [False, True])
def test_read_run_leaves_out_a_line_without_an_end(kept: bool, tmp_path: Path) -> None:
    file = tmp_path / ("l1-1.csv" if kept else "metrics.csv")
    file.write_text("step,val/top1\n1,0.5\n2,0.")
    (tmp_path / "l1-1.json").write_text('{"settings": {}, "seed": 1, "cpu_minutes": 1}')
    run = read_run(tmp_path / "l1-1" if kept else tmp_path)
    assert run.scalars["val/top1"].values.tolist() == [0.5]
    assert run.cut_off == (file,)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["events.out.tfevents.1", "metrics.csv", "l1-1.csv"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_read_run_refuses_what_is_no_regular_file(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "l1-1.json").write_text('{"settings": {}, "seed": 1, "cpu_minutes": 1}')
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    (folder,) = find_runs([tmp_path])
    with pytest.raises(InputError, match=f"{name} is not a regular file"):
        read_run(folder)


def test_epochs_at_gives_steps_where_no_epochs_are_logged(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,val/top1\n3,0.5\n")
    run = read_run(tmp_path)
    assert run.epochs_at(np.array([3])).tolist() == [3]


def test_read_run_takes_the_later_of_two_files(make_run: Callable[..., Path]) -> None:
    folder = make_run(accuracy=[0.5, 0.75])
    (first,) = folder.glob("events*")
    first.rename(folder / "events.out.tfevents.0")
    make_run(accuracy=[0.25])
    assert read_run(folder).scalars["val/top1"].values.tolist() == [0.25, 0.75]


def test_find_runs_lists_each_once_by_number(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folders = [make_run(f"runs/a/version_{number}") for number in (10, 9)] + [make_run("runs/b")]
    found = find_runs([tmp_path / "runs" / "b", tmp_path / "runs"])
    assert found == [folders[2], folders[1], folders[0]]


def test_folders_of_add_scalars_and_add_hparams_are_of_their_run(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "a")) as writer:
        writer.add_scalar("val/top1", 0.5, 9)
        writer.add_scalars("val/loss", {"ema": 1.0, "last": 2.0}, 9)
        writer.add_hparams({"lr": 0.1}, {"val/top1": 0.9, "hparam/best": 0.75})
        other = SummaryWriter(str(tmp_path / "a" / "version_0"))
    other.add_scalar("val/top1", 0.25, 9)
    other.close()
    (tmp_path / "a" / "version_0" / "hparams.yaml").write_text("lr: 1")
    assert find_runs([tmp_path]) == [tmp_path / "a", tmp_path / "a" / "version_0"]
    scalars = {tag: list(x.values) for tag, x in read_run(tmp_path / "a").scalars.items()}
    losses = {"val/loss/ema": [1.0], "val/loss/last": [2.0]}
    assert scalars == {"val/top1": [0.5], "hparam/best": [0.75], **losses}


@pytest.mark.parametrize("name", ["x/run", "version_0", "kept"])
def test_runs_below_a_stray_writer_are_shown(name: str, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / name):
        with SummaryWriter(str(folder)) as writer:
            writer.add_scalar("val/top1", 0.5, 9)
            writer.add_scalars("val/loss", {"ema": 1.0}, 9)
        if name == "kept":
            (tmp_path / name / "checkpoints").mkdir(parents=True, exist_ok=True)
    assert find_runs([tmp_path]) == [tmp_path, tmp_path / name]


def test_kept_runs_are_read_without_folders(tmp_path: Path) -> None:
    for seed in (10, 9):
        (tmp_path / f"l1-{seed}.csv").write_text(CSV)
        (tmp_path / f"l1-{seed}.json").write_text(
            f'{{"settings": {{"norm": "l1"}}, "seed": {seed}, "cpu_minutes": 1.5}}'
        )
    first, second = map(read_run, find_runs([tmp_path]))
    assert (first.seed, second.seed, first.name, second.name) == (9, 10, "l1", "l1")
    assert (first.settings, first.seconds) == ({"norm": "l1"}, 90)
    assert first.scalars["val/top1"].values.tolist() == [0.5, 0.75]


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", '{"seed": 1}', "[" * 100_000),
        '{"settings": 1, "seed": 1, "cpu_minutes": 1}',
        '{"settings": {}, "seed": [1], "cpu_minutes": 1}',
        '{"settings": {}, "seed": 1, "cpu_minutes": "x"}',
        '{"settings": {}, "seed": 1, "cpu_minutes": "1e999"}',
    ],
)
def test_read_run_refuses_a_damaged_kept_run(content: str, tmp_path: Path) -> None:
    (tmp_path / "l1-1.json").write_text(content)
    with pytest.raises(InputError, match=r"l1-1.json is damaged, or not of a run"):
        read_run(tmp_path / "l1-1")


def test_find_runs_refuses_a_path_without_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no folder '.*nowhere' in"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="holds no run: there is neither an event file"):
        find_runs([tmp_path])


def test_flatten_settings_names_classes_and_ignores_where_it_ran() -> None:
    steering = {"class_path": "nm.LRCorrection", "init_args": {"reference": "x", "mode": "paper"}}
    swap = {"class_path": "nm.NormSwap"}
    tracker = {"class_path": "nm.WeightNormTracker", "init_args": {"steering": steering}}
    config = {
        "seed_everything": 1,
        "trainer": {"logger": {"class_path": "B"}, "callbacks": [tracker, swap], "max_time": None},
        "data": {"class_path": "nm.CIFAR10", "init_args": {"root": "here", "batch_size": 3}},
        "betas": [0.9, 0.99],
    }
    assert flatten_settings(config) == {
        "trainer.callbacks.WeightNormTracker": "yes",
        "trainer.callbacks.WeightNormTracker.steering": "LRCorrection",
        "trainer.callbacks.WeightNormTracker.steering.mode": "paper",
        "trainer.callbacks.NormSwap": "yes",
        "data": "CIFAR10",
        "data.batch_size": 3,
        "betas": "[0.9, 0.99]",
    }


def test_read_saved_config_builds_no_objects(tmp_path: Path) -> None:
    text = "lr: 0.1\nmodel: !!python/object:a.Net\n  depth: 3\nkind: !!python/name:os.system ''\n"
    (tmp_path / "hparams.yaml").write_text(text)
    assert read_saved_config(tmp_path)["lr"] == 0.1
    assert read_saved_config(tmp_path)["kind"] == "tag:yaml.org,2002:python/name:os.system"


def write_events(folder: Path, *, pictures: int = 0) -> Path:
    with SummaryWriter(str(folder)) as writer:
        for step in range(5):
            writer.add_scalar("a/b", step / 3, step, walltime=100.0 + step)
            writer.add_scalar("new", -step, step, new_style=True, walltime=100.0 + step)
        writer.add_histogram("histogram", np.arange(10), 0)
        writer.add_text("text", "no number", 0)
        for step in range(pictures):
            picture = np.random.default_rng(step).integers(0, 255, (3, 200, 200), dtype=np.uint8)
            writer.add_image("picture", picture, step)
    (file,) = folder.glob("events*")
    return file


def test_read_event_file_equals_tensorboards_reader(tmp_path: Path) -> None:
    file = write_events(tmp_path, pictures=1)
    points = list(read_event_file(file))
    assert {point.tag for point in points} == {"a/b", "new"}
    events = EventAccumulator(str(file)).Reload()
    expected = [(event.step, event.value, event.wall_time) for event in events.Scalars("a/b")]
    assert [tuple(point[1:]) for point in points if point.tag == "a/b"] == expected
    assert [p.value for p in points if p.tag == "new"] == [0, -1, -2, -3, -4]


@pytest.mark.parametrize("missing", [1, 5, 20])
def test_read_event_file_stops_at_a_record_that_is_not_whole(missing: int, tmp_path: Path) -> None:
    file = write_events(tmp_path)
    whole = list(read_event_file(file))
    file.write_bytes(file.read_bytes()[:-missing])
    assert list(read_event_file(file)) == whole  # the last record is a text
    file.write_bytes(b"")
    assert list(read_event_file(file)) == []


def test_read_event_file_refuses_other_files(tmp_path: Path) -> None:
    file = tmp_path / "events.out.tfevents.1"
    length = (10).to_bytes(8, "little") + bytes(4)
    file.write_bytes(length + b"\xff" * 10 + bytes(4))
    with pytest.raises(InputError, match="is damaged, or not an event file of TensorBoard"):
        list(read_event_file(file))


def test_read_event_file_refuses_any_changed_bit(tmp_path: Path) -> None:
    file = write_events(tmp_path)
    content = file.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        with pytest.raises(InputError, match="is damaged, or not an event file of TensorBoard"):
            list(read_event_file(file))


def test_read_event_file_skips_pictures_fast(tmp_path: Path) -> None:
    file = write_events(tmp_path, pictures=30)
    started = time.perf_counter()
    assert len(list(read_event_file(file))) == 10
    assert file.stat().st_size > 3e6
    assert time.perf_counter() - started < 0.5  # TensorBoard's reader takes a second and more
