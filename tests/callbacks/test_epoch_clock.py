"""Test which moment of a recording the steps of a run look up."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging
from torch import Tensor

from nmlightning.callbacks import WeightNormTracker
from nmlightning.errors import InputError
from nmlightning.optim import LRCorrection
from nmlightning.weights.history import NormHistory
from recorded_runs import StepsByHand, Trains, make_data, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:The recording is from a run without weight decay")


class Moments(pl.Callback):
    """Notes the epoch of each step, as steering sees it after the step."""

    def __init__(self) -> None:
        self.of: list[list[float]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        tracker: Any = trainer.callbacks[0]  # type: ignore[attr-defined]
        self.of = [[] for _ in tracker.handles]
        for moments, handle in zip(self.of, tracker.handles, strict=True):
            optimizer = handle._optimizer
            optimizer.register_step_post_hook(
                lambda *_, seen=moments, clock=handle.clock: seen.append(clock()["epoch"])
            )


def follow(
    folder: Path, history: NormHistory, module: Any = None, data: Any = None, **options: Any
) -> list[float]:
    """Return the moments of the convolutions' steps."""
    tracker, moments = WeightNormTracker(steering=LRCorrection(history)), Moments()
    others = options.pop("others", [])
    start = options.pop("start", None)
    trainer = make_trainer(folder, tracker, moments, *others, **options)
    trainer.fit(module or Trains(), make_data() if data is None else data, ckpt_path=start)
    trainer.save_checkpoint(folder / "last.ckpt")
    return moments.of[0]


def record(folder: Path, module: Any = None, data: Any = None, **options: Any) -> NormHistory:
    trainer = make_trainer(folder, WeightNormTracker(), **options)
    trainer.fit(module or Trains(), make_data() if data is None else data)
    return NormHistory.load(folder)


def make_history(steps: list[int], epochs: list[int], **provenance: Any) -> NormHistory:
    """Return norms that grow by 1 % a step."""
    norms = {
        name: (1 + 0.01 * np.array(steps))[:, None] * np.ones(4)
        for name in ("net.0.weight", "net.3.weight")
    }
    return NormHistory.from_arrays(norms, steps, epochs, provenance=provenance)


TWO_EPOCHS = make_history([0, 4, 8], [0, 0, 1])
STEPS = [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]


def test_clock_of_other_batch_sizes(tmp_path: Path) -> None:
    assert follow(tmp_path, TWO_EPOCHS, data=make_data(2), max_epochs=2) == STEPS[::2]


@pytest.mark.parametrize("batches", [5, 6])
def test_clock_counts_accumulated_batches_once(batches: int, tmp_path: Path) -> None:
    moments = follow(tmp_path, TWO_EPOCHS, data=make_data(batches), accumulate_grad_batches=2)
    assert moments == pytest.approx([0, 1 / 3, 2 / 3])


@pytest.mark.parametrize("optimizers", [1, 2])
@pytest.mark.parametrize("every", [1, 2])
def test_clock_of_manual_optimization(optimizers: int, every: int, tmp_path: Path) -> None:
    module = StepsByHand(every, optimizers)
    moments = follow(tmp_path, TWO_EPOCHS, module, make_data(4 * every), max_epochs=2)
    assert moments == STEPS


def test_clock_of_data_without_a_length(tmp_path: Path) -> None:
    history = make_history([0, 8, 16, 24], [0, 0, 1, 2])
    moments = follow(tmp_path, history, data=make_data(sized=False), max_epochs=3)
    eighths = [0, 1 / 8, 2 / 8, 3 / 8]
    assert moments == [*eighths, *(1 + x for x in STEPS[:4]), *(2 + x for x in STEPS[:4])]


def test_data_longer_than_the_recording_is_refused(tmp_path: Path) -> None:
    message = "recording has 4 steps in epoch 1, and this run, whose data has no length, continues"
    with pytest.raises(InputError, match=message):
        follow(tmp_path, TWO_EPOCHS, data=make_data(5, sized=False))


def test_resume_keeps_the_length_of_the_last_epoch(tmp_path: Path) -> None:
    history = make_history([0, 8, 16], [0, 0, 1])
    data = make_data(sized=False)
    follow(tmp_path / "first", history, data=data)
    start = tmp_path / "first" / "last.ckpt"
    moments = follow(tmp_path / "second", history, data=data, max_epochs=2, start=start)
    assert moments == STEPS[4:]


@pytest.mark.parametrize("sized", [True, False])
def test_recording_stopped_inside_an_epoch(sized: bool, tmp_path: Path) -> None:
    data = make_data(5, sized=sized)
    history = record(tmp_path / "recorded", data=data, max_epochs=3, max_steps=7)
    assert history.steps.tolist() == [0, 5, 7]
    same = {"max_epochs": 3, "max_steps": 7}
    moments = follow(tmp_path / "same", history, data=data, **same)
    assert moments == [0, 0.2, 0.4, 0.6, 0.8, 1, 1.2]
    places = [history.place(epoch=epoch, align="interpolate") for epoch in (0.8, 1, 1.2)]
    assert places == [(0, 1, 0.8), (1, 1, 0), (1, 2, 0.5)]
    message = r"covers 1.4 epochs, and the run has 2: record a longer run, or set max_epochs to 1"
    with pytest.raises(InputError, match=message):
        follow(tmp_path / "longer", history, data=data, max_epochs=2)
    with pytest.raises(InputError, match=r"covers 1.4 epochs, and the run has 1.6: record a"):
        follow(tmp_path / "longer", history, data=data, max_epochs=2, max_steps=8)


@pytest.mark.parametrize("epochs", [None, 1, 99])
def test_recording_of_part_of_an_epoch(epochs: int | None, tmp_path: Path) -> None:
    history = record(tmp_path / "recorded", max_steps=3)
    options: Any = {"max_epochs": epochs}
    assert follow(tmp_path / "same", history, max_steps=3, **options) == STEPS[:3]
    with pytest.raises(InputError, match=r"covers 0.75 epochs, and the run has 1: record a longer"):
        follow(tmp_path / "longer", history, max_steps=4, **options)


def test_clock_of_epochs_of_other_lengths(tmp_path: Path) -> None:
    class Shrinks:
        batches = 6

        def __iter__(self) -> Any:
            self.batches -= 1  # Lightning looks whether it can iterate before it does
            return iter(make_data(self.batches))

    history = record(tmp_path / "recorded", data=Shrinks(), max_epochs=2)
    assert history.steps.tolist() == [0, 4, 7]
    assert follow(tmp_path / "same", history, data=make_data(), max_epochs=2) == STEPS


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_clock_in_an_epoch_added_by_averaging(tmp_path: Path) -> None:
    averaging = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    moments = follow(tmp_path, TWO_EPOCHS, others=[averaging], max_epochs=2)
    assert moments == [*STEPS, pytest.approx(2)]
    assert NormHistory.load(tmp_path).epochs.tolist() == [0, 0, 1]
    with pytest.raises(InputError, match=r"covers 2 epochs, and the run has 3: record a longer"):
        follow(tmp_path, TWO_EPOCHS, others=[averaging], max_epochs=3)


class StepsBeside(StepsByHand):
    """Takes steps that Lightning does not count, by one optimizer of all parameters."""

    def __init__(self, way: str) -> None:
        super().__init__(optimizers=1)
        self.way = way

    def configure_optimizers(self) -> Any:
        own = super().configure_optimizers()
        if self.way == "own":
            self.own = own[0]
            return []
        return Twice(own[0]) if self.way == "wrapper" else own

    def training_step(self, batch: list[Tensor], index: int) -> None:
        pl_optimizer: Any = self.optimizers()
        native: Any = self.optimizers(use_pl_optimizer=False)
        steps = {
            "native": lambda: native.step(),
            "attribute": lambda: pl_optimizer.optimizer.step(),
            "closure": lambda: native.step(lambda: None),
            "wrapper": lambda: (native.first_step(), native.second_step()),
            "own": lambda: self.own.step(),
        }
        self.zero_grad()
        self.manual_backward(Trains.training_step(self, batch, index))
        steps[self.way]()


class Twice(torch.optim.Optimizer):
    """A wrapper that moves weights there and back, as SAM; nobody calls its own `step`."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self.base = base

    def first_step(self) -> None:
        self.moved = [(q, 0.01 * q.grad) for group in self.param_groups for q in group["params"]]
        for parameter, move in self.moved:
            parameter.data += move

    def second_step(self) -> None:
        for parameter, move in self.moved:
            parameter.data -= move
        self.base.step()


@pytest.mark.parametrize("way", ["native", "attribute", "closure", "wrapper", "own"])
def test_steps_that_lightning_does_not_count_are_recorded(way: str, tmp_path: Path) -> None:
    history = record(tmp_path, StepsBeside(way), max_epochs=3)
    assert history.steps.tolist() == [0, 4, 8, 12]
    assert history.provenance["steps_per_epoch"] == 4
    np.testing.assert_allclose(history.learning_rates[1:], 0.05)


@pytest.mark.parametrize("way", ["native", "closure"])
def test_uncounted_steps_are_steered_and_resumed(way: str, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("counted", "whole", "half")]
    history = make_history([4, 8, 12], [0, 1, 2])
    counted = follow(folders[0], history, StepsByHand(optimizers=1), max_epochs=3)
    whole = StepsBeside(way)
    assert follow(folders[1], history, whole, max_epochs=3) == counted
    follow(folders[2], history, StepsBeside(way), max_epochs=2)
    resumed, start = StepsBeside(way), folders[2] / "last.ckpt"
    assert follow(folders[2], history, resumed, max_epochs=3, start=start) == counted[8:]
    assert NormHistory.load(folders[2]).steps.tolist() == [0, 4, 8, 12]
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
