import numpy as np
import pytest

from nmlightning.errors import InputError
from nmlightning.weights.history import RecordedClock


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
def test_how_much_it_covers(
    steps: list[int], epochs: list[int], steps_per_epoch: int | None, covered: float
) -> None:
    assert make_clock(steps, epochs, steps_per_epoch).covered == pytest.approx(covered)


def test_steps_in_an_epoch_that_a_run_stopped_inside() -> None:
    clock = make_clock([0, 5, 7], [0, 0, 1])
    assert [clock.steps_in(epoch) for epoch in (0, 1)] == [5, 2]
    assert [clock.length_of(epoch) for epoch in (0, 1)] == [5, 5]
    assert [clock.step_at(epoch) for epoch in (0.2, 1, 1.2, 2)] == pytest.approx([1, 5, 6, 10])
    with pytest.raises(InputError, match="does not reach step 10"):
        clock.around(clock.step_at(2))


def test_steps_of_a_run_that_was_recorded_late() -> None:
    clock = make_clock([5, 10, 15], [1, 1, 2])
    assert [clock.step_at(epoch) for epoch in (1, 1.2, 2)] == pytest.approx([5, 6, 10])
    with pytest.raises(InputError, match="does not reach epoch 0"):
        clock.step_at(0.5)
