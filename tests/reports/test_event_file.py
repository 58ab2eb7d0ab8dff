import time
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from nmlightning.errors import InputError
from nmlightning.reports.run import read_event_file


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


def test_scalars_are_those_of_tensorboards_reader(tmp_path: Path) -> None:
    file = write_events(tmp_path, pictures=1)
    points = list(read_event_file(file))
    assert {point.tag for point in points} == {"a/b", "new"}
    events = EventAccumulator(str(file)).Reload()
    expected = [(event.step, event.value, event.wall_time) for event in events.Scalars("a/b")]
    assert [tuple(point[1:]) for point in points if point.tag == "a/b"] == expected
    assert [p.value for p in points if p.tag == "new"] == [0, -1, -2, -3, -4]


@pytest.mark.parametrize("missing", [1, 5, 20])
def test_a_run_that_still_writes(missing: int, tmp_path: Path) -> None:
    file = write_events(tmp_path)
    whole = list(read_event_file(file))
    file.write_bytes(file.read_bytes()[:-missing])
    assert list(read_event_file(file)) == whole  # the last record is a text
    file.write_bytes(b"")
    assert list(read_event_file(file)) == []


def test_other_files(tmp_path: Path) -> None:
    file = tmp_path / "events.out.tfevents.1"
    length = (10).to_bytes(8, "little") + bytes(4)
    file.write_bytes(length + b"\xff" * 10 + bytes(4))
    with pytest.raises(InputError, match="is damaged, or no event file of TensorBoard"):
        list(read_event_file(file))


def test_pictures_cost_little(tmp_path: Path) -> None:
    file = write_events(tmp_path, pictures=30)
    started = time.perf_counter()
    assert len(list(read_event_file(file))) == 10
    assert file.stat().st_size > 3e6
    assert time.perf_counter() - started < 0.5  # TensorBoard's reader takes a second and more
