"""Test what becomes of a checkpoint's steering in a run that is steered otherwise."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules import PlModule, make, make_trainer
from nmlightning.callbacks import WeightNormTracker
from nmlightning.errors import InputError
from nmlightning.optim import DecayEquivalentLR, LRCorrection, NormSchedule
from nmlightning.weights.history import NormHistory

NORMS = {"net.0.weight": [[1.0] * 4] * 2, "net.3.weight": [[1.0] * 4] * 2}
HISTORY = NormHistory.from_arrays(NORMS, [4, 8], [0, 1])
CONVOLUTIONS = ["net.0.weight", "net.3.weight"]


def fit(folder: Path, tracker: WeightNormTracker | None, start: Path | None = None) -> Path:
    """Train an epoch more, and return the checkpoint."""
    images = torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(images, torch.arange(16) % 3), batch_size=4)
    callbacks = [] if tracker is None else [tracker]
    epochs = 1 if start is None else 2
    trainer: pl.Trainer = make_trainer(
        PlModule, *callbacks, default_root_dir=folder, max_epochs=epochs
    )
    trainer.fit(make(PlModule), data, data, ckpt_path=start)
    trainer.save_checkpoint(folder / "end.ckpt")
    return folder / "end.ckpt"


def steer(rule: Any) -> WeightNormTracker:
    return WeightNormTracker(steering=rule)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            LRCorrection(HISTORY),
            NormSchedule(HISTORY),
            "was steered by LRCorrection, and this run is by NormSchedule: resume with the same",
        ),
        (
            DecayEquivalentLR(0.01),
            LRCorrection(HISTORY),
            "was steered by DecayEquivalentLR, and this run is by LRCorrection: resume with",
        ),
        (
            DecayEquivalentLR(0.01),
            DecayEquivalentLR(0.02),
            "by DecayEquivalentLR with weight_decay=0.01, and this run is with weight_decay=0.02",
        ),
        (
            LRCorrection(HISTORY),
            LRCorrection(HISTORY, max_rotation=None),
            "by LRCorrection with max_rotation=0.2, and this run is with max_rotation=None: resume",
        ),
        (
            DecayEquivalentLR(0.01),
            DecayEquivalentLR(0.01, exclude=["net.0.*"]),
            "state of DecayEquivalentLR is of other weights; net.0.weight differs",
        ),
    ],
)
def test_another_rule(first: Any, second: Any, message: str, tmp_path: Path) -> None:
    start = fit(tmp_path / "first", steer(first))
    with pytest.raises(InputError, match=message) as caught:
        fit(tmp_path / "second", steer(second), start)
    assert "\n" not in str(caught.value)


def test_the_same_rule(tmp_path: Path) -> None:
    for rule in (LRCorrection(HISTORY), NormSchedule(HISTORY), DecayEquivalentLR(0.01)):
        folder = tmp_path / type(rule).__name__
        start = fit(folder / "first", steer(rule))
        fit(folder / "second", steer(rule), start)


def test_steering_that_is_taken_away(tmp_path: Path) -> None:
    start = fit(tmp_path / "first", steer(DecayEquivalentLR(0.01)))
    message = "checkpoint was steered by DecayEquivalentLR, and this run is not steered"
    with pytest.warns(UserWarning, match=message):
        fit(tmp_path / "second", WeightNormTracker(), start)


@pytest.mark.parametrize("tracker", [None, WeightNormTracker()])
def test_steering_that_is_new(tracker: WeightNormTracker | None, tmp_path: Path) -> None:
    start = fit(tmp_path / "first", tracker)
    message = "The checkpoint was not steered; DecayEquivalentLR steers this run from step 4 on"
    with pytest.warns(UserWarning, match=message):
        fit(tmp_path / "second", steer(DecayEquivalentLR(0.01)), start)


def test_steering_of_more_optimizers(tmp_path: Path) -> None:
    start = fit(tmp_path / "first", steer(DecayEquivalentLR(0.01)))
    checkpoint = torch.load(start, weights_only=True)
    states = checkpoint["callbacks"]["WeightNormTracker"]["steering"]["attachments"]
    states.append(states[0])
    torch.save(checkpoint, start)
    message = "The checkpoint was steered in 2 optimizers, and this run is in 1"
    with pytest.raises(InputError, match=message):
        fit(tmp_path / "second", steer(DecayEquivalentLR(0.01)), start)
