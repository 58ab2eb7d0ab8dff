"""The file that a run records into, and the records that it resumes with."""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules import small_net
from nmlightning.callbacks import WeightNormTracker
from nmlightning.optim import DecayEquivalentLR, Hyperball
from nmlightning.weights.history import NormHistory
from nmlightning.weights.recording_file import FILE_NAME
from recorded_runs import BATCHES, StepsByHand, Trains, make_data, make_trainer
from scripts import run_python

pytestmark = pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists")


def fit(
    folder: Path,
    epochs: int,
    start: Path | None = None,
    others: tuple[Any, ...] = (),
    **options: Any,
) -> Path:
    """Return the checkpoint at the end of a run in a folder."""
    trainer = make_trainer(folder, WeightNormTracker(1), *others, max_epochs=epochs, **options)
    trainer.fit(Trains(), make_data(), ckpt_path=start)
    checkpoint = folder / f"{epochs}.ckpt"
    trainer.save_checkpoint(checkpoint)
    return checkpoint


def recordings(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*.safetensors"))


def steps_of(folder: Path) -> list[int]:
    steps: list[int] = NormHistory.load(folder).steps.tolist()
    return steps


def test_resume_in_the_same_folder_continues_the_file(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", 3).parent
    folder = tmp_path / "run"
    fit(folder, 3, start=fit(folder, 1))
    assert recordings(folder) == [FILE_NAME]
    one, other = NormHistory.load(whole), NormHistory.load(folder)
    assert other.steps.tolist() == one.steps.tolist()
    assert other.provenance["finished"] is True  # also after a checkpoint of its end
    for name, norms in one.norms.items():
        np.testing.assert_array_equal(other.norms[name], norms)


def test_resume_with_a_logger_version(tmp_path: Path) -> None:
    def logger() -> Any:
        return pytorch_lightning.loggers.CSVLogger(tmp_path, "run", version=0)

    start = fit(tmp_path, 1, logger=logger())
    fit(tmp_path, 3, start, logger=logger())
    assert recordings(tmp_path) == [f"run/version_0/{FILE_NAME}"]
    assert steps_of(tmp_path / "run" / "version_0") == list(range(3 * BATCHES + 1))


def test_file_of_another_run_is_kept(tmp_path: Path) -> None:
    start = fit(tmp_path, 1)
    (tmp_path / FILE_NAME).unlink()
    fit(tmp_path, 2)
    with pytest.warns(UserWarning, match="is gone: .*weight_norms.safetensors. The new one starts"):
        fit(tmp_path, 3, start)
    assert steps_of(tmp_path) == list(range(2 * BATCHES + 1))
    assert steps_of(tmp_path / "weight_norms-v1.safetensors") == list(
        range(BATCHES, 3 * BATCHES + 1)
    )


def test_resume_in_a_moved_folder(tmp_path: Path) -> None:
    fit(tmp_path / "first", 1)
    (tmp_path / "first").rename(tmp_path / "moved")
    fit(tmp_path / "moved", 3, tmp_path / "moved" / "1.ckpt")
    assert recordings(tmp_path) == [f"moved/{FILE_NAME}"]
    assert steps_of(tmp_path / "moved") == list(range(3 * BATCHES + 1))


@pytest.mark.parametrize("is_here", [False, True])
@pytest.mark.parametrize("layout", ["", "checkpoints"])
def test_resume_of_a_renamed_project_finds_the_recording(
    tmp_path: Path, layout: str, is_here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / "project" / "first").mkdir(parents=True)
    monkeypatch.chdir(folder if is_here else tmp_path)  # here records go to lightning_logs
    start = fit(folder, 1)
    place = start.parent / layout
    place.mkdir(exist_ok=True)
    start.rename(place / "last.ckpt")
    (tmp_path / "project").rename(tmp_path / "renamed")
    fit(tmp_path / "other", 3, tmp_path / "renamed" / "first" / layout / "last.ckpt")
    assert steps_of(tmp_path / "other") == list(range(3 * BATCHES + 1))


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_resume_after_a_kill(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "import pytorch_lightning as pl\n"
        "sys.path.append(sys.argv[1])\n"
        "from test_resumed_recording import fit\n"
        "class Kill(pl.Callback):\n"
        "    def on_train_batch_end(self, trainer, *_):\n"
        "        if trainer.global_step == 6:\n"
        "            trainer.save_checkpoint('killed.ckpt')\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "fit(Path(), 3, others=(Kill(),))\n"
    )
    run_python("-c", code, Path(__file__).parent, cwd=tmp_path, code=-signal.SIGKILL)
    assert steps_of(tmp_path) == list(range(7))
    fit(tmp_path, 3, tmp_path / "killed.ckpt")
    assert recordings(tmp_path) == [FILE_NAME]
    assert steps_of(tmp_path) == list(range(3 * BATCHES + 1))


@pytest.mark.parametrize("logger", [False, True])
def test_fast_dev_run_writes_nothing(
    logger: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"fast_dev_run": True, "logger": logger}  # Lightning makes it a DummyLogger
    tracker = WeightNormTracker(1)
    make_trainer(tmp_path, tracker, **options).fit(Trains(), make_data())
    assert not list(tmp_path.iterdir())
    assert tracker.path is None


class Adversaries(StepsByHand):
    """Two nets, of an optimizer each."""

    def __init__(self) -> None:
        super().__init__()
        self.other = small_net()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=0.05) for net in (self.net, self.other)]

    def training_step(self, batch: list[Tensor], index: int) -> None:
        for net, optimizer in zip((self.net, self.other), self.optimizers(), strict=True):  # type: ignore[arg-type]
            self.manual_backward(F.cross_entropy(net(batch[0]), batch[1]))
            optimizer.step()
            optimizer.zero_grad()


def test_each_of_two_trackers_has_a_file_and_a_state(tmp_path: Path) -> None:
    def run(folder: Path, epochs: int, start: Path | None = None) -> list[WeightNormTracker]:
        trackers = [
            WeightNormTracker(
                include=[f"{net}.?.weight"], steering=Hyperball(include=[f"{net}.0.weight"])
            )
            for net in ("net", "other")
        ]
        trackers[0].steering = DecayEquivalentLR(0.01, include=["net.0.weight"])
        trainer = make_trainer(folder, *trackers, max_epochs=epochs)
        trainer.fit(Adversaries(), make_data(), ckpt_path=start)
        trainer.save_checkpoint(folder / "last.ckpt")
        return trackers

    run(tmp_path, 1)
    trackers = run(tmp_path, 2, tmp_path / "last.ckpt")
    assert sorted(str(t.path and t.path.name) for t in trackers) == recordings(tmp_path)
    for tracker, net in zip(trackers, ("net", "other"), strict=True):
        history = NormHistory.load(str(tracker.path))
        assert {name.partition(".")[0] for name in history.norms} == {net}
        assert history.steps.tolist() == [0, 2 * BATCHES, 4 * BATCHES]
        assert [handle.steps for handle in tracker.handles] == [2 * BATCHES]
    states = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert len([key for key in states if key.startswith("WeightNormTracker")]) == 2


@pytest.mark.parametrize("own", [(), ["other.3.weight"]])
def test_trackers_patterns_limit_a_rule_that_includes_nothing(
    own: Sequence[str], tmp_path: Path
) -> None:
    trackers = [
        WeightNormTracker(include=["net.*"], exclude=["net.3.*"], steering=Hyperball()),
        WeightNormTracker(exclude=["net.*", "other.3.*"], steering=Hyperball(include=own)),
    ]
    make_trainer(tmp_path, *trackers, max_epochs=1).fit(Adversaries(), make_data())
    steered = [[name for h in tracker.handles for name in h.steered] for tracker in trackers]
    kept = {name for name, q in Adversaries().named_parameters() if q.dim() > 1}
    assert set(steered[0]) == {x for x in kept if x.startswith("net.")} - {"net.3.weight"}
    left = {x for x in kept if x.startswith("other.")} - {"other.3.weight"}
    assert set(steered[1]) == (set(own) or left)


@pytest.mark.parametrize(
    ("own", "reason"), [(False, "only step"), (True, "SGD steps instead; return it")]
)
def test_gradients_without_a_step_that_calls_the_rule_are_warned_of(
    own: bool, reason: str, tmp_path: Path
) -> None:
    class OtherName(Adversaries):
        def training_step(self, batch: list[Tensor], index: int) -> None:
            self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
            if own:
                torch.optim.SGD(self.net.parameters(), 0.1).step()

    tracker = WeightNormTracker(steering=Hyperball(include=["net.0.weight"]))
    with pytest.warns(UserWarning, match="has called Hyperball yet: " + reason) as seen:
        make_trainer(tmp_path, tracker, max_epochs=2).fit(OtherName(), make_data())
    assert sum("has called Hyperball" in str(warning.message) for warning in seen) == 1


def test_tracker_finds_the_state_of_an_older_key(tmp_path: Path) -> None:
    for epochs, start in ((1, None), (2, tmp_path / "last.ckpt")):
        trainer = make_trainer(tmp_path, WeightNormTracker(2), max_epochs=epochs)
        trainer.fit(Trains(), make_data(), ckpt_path=start)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
        (key,) = checkpoint["callbacks"]
        checkpoint["callbacks"] = {"WeightNormTracker": checkpoint["callbacks"][key]}
        torch.save(checkpoint, tmp_path / "last.ckpt")
    assert recordings(tmp_path) == [FILE_NAME]
    assert steps_of(tmp_path) == [0, 2, 4, 6, 8]
