"""Test WeightNormTracker on LightningModules of both Lightning packages."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from torch import Tensor, nn

import lightning_modules
import recorded_runs
from lightning_modules import Trains, make_data
from nmlightning.callbacks import WeightNormTracker
from nmlightning.errors import InputError
from nmlightning.optim import DecayEquivalentLR, LRCorrection
from nmlightning.weights.channel_norms import channel_norms
from nmlightning.weights.history import NormHistory
from nmlightning.weights.recording_file import FILE_NAME
from trainers import SaveAt

NAMES = ["net.0.weight", "net.3.weight", "net.7.weight"]
EPOCHS, BATCHES = 3, 4


class Notes:
    """Notes the norms after each batch; its rate is halved after each epoch."""

    def __init__(self, weight_decay: float = 0.0) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.weight_decay = weight_decay
        self.seen: list[dict[str, Tensor]] = []

    def configure_optimizers(self) -> Any:
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": self.weight_decay}
        optimizer = torch.optim.SGD(self.parameters(), **options)  # type: ignore[attr-defined]
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    def on_train_batch_end(self, *_: Any) -> None:
        parameters = self.named_parameters()  # type: ignore[attr-defined]
        self.seen.append({n: channel_norms(q) for n, q in parameters if q.dim() > 1})


class PlModule(Notes, Trains, pytorch_lightning.LightningModule):
    pass


class UnifiedModule(Notes, Trains, lightning.pytorch.LightningModule):
    pass


MODULES = (PlModule, UnifiedModule)


def make_trainer(module: type, folder: Path, *callbacks: Any, **options: Any) -> Any:
    settings = {"max_epochs": EPOCHS, "default_root_dir": folder, **options}
    return lightning_modules.make_trainer(module, *callbacks, **settings)


def record(
    folder: Path, module: type = PlModule, every: Any = "epoch", **options: Any
) -> NormHistory:
    trainer = make_trainer(module, folder, WeightNormTracker(every))
    trainer.fit(module(**options), make_data())
    return NormHistory.load(folder)


@pytest.mark.parametrize("make", MODULES)
def test_tracker_records_norms_at_each_epoch(make: Any, tmp_path: Path) -> None:
    module = make(weight_decay=1e-3)
    initial = {n: channel_norms(q) for n, q in module.named_parameters() if q.dim() > 1}
    tracker = WeightNormTracker()
    make_trainer(make, tmp_path, tracker).fit(module, make_data())
    assert tracker.path == tmp_path / FILE_NAME
    history = NormHistory.load(tmp_path)
    assert list(history.norms) == NAMES
    assert history.steps.tolist() == [0, 4, 8, 12]
    assert history.epochs.tolist() == [0, 0, 1, 2]
    for name in NAMES:
        expected = torch.stack([initial[name], *(module.seen[s][name] for s in (3, 7, 11))])
        np.testing.assert_array_equal(history.norms[name], expected.numpy())
    np.testing.assert_allclose(history.learning_rates[:, 0], [0.1, 0.1, 0.05, 0.025])
    np.testing.assert_allclose(history.weight_decays, 1e-3)


@pytest.mark.parametrize(
    ("every", "steps"), [(1, range(13)), (3, [0, 3, 4, 6, 8, 9, 12]), (99, [0, 4, 8, 12])]
)
def test_tracker_records_every_n_steps(every: int, steps: list[int], tmp_path: Path) -> None:
    history = record(tmp_path, every=every)
    assert history.steps.tolist() == list(steps)
    assert history.epochs.tolist() == [max(0, math.ceil(step / BATCHES) - 1) for step in steps]


def test_tracker_records_every_n_steps_of_several_optimizers(tmp_path: Path) -> None:
    """Two steps a batch pass a multiple of three in the second, third, fifth and sixth batch."""
    tracker = WeightNormTracker(3)
    recorded_runs.make_trainer(tmp_path, tracker, max_epochs=2).fit(
        recorded_runs.StepsByHand(), recorded_runs.make_data(6)
    )
    assert NormHistory.load(tmp_path).steps.tolist() == [0, 4, 6, 10, 12, 16, 18, 22, 24]


def test_tracker_records_provenance(tmp_path: Path) -> None:
    pytorch_lightning.seed_everything(7)
    provenance = record(tmp_path).provenance
    assert provenance["seed"] == 7
    assert provenance["world_size"] == 1
    assert provenance["steps_per_epoch"] == BATCHES
    assert provenance["finished"] is True
    assert provenance["optimizers"][0]["name"] == "SGD"
    assert provenance["optimizers"][0]["momentum"] == 0.9
    assert provenance["versions"]["torch"]


def test_tracker_records_what_patterns_name(tmp_path: Path) -> None:
    tracker = WeightNormTracker(include=["net.?.weight"], exclude=["net.7.*"])
    make_trainer(PlModule, tmp_path, tracker).fit(PlModule(), make_data())
    assert list(NormHistory.load(tmp_path).norms) == NAMES[:2]


def test_tracker_names_lazy_layers_once(tmp_path: Path) -> None:
    class Lazy(PlModule):
        def __init__(self) -> None:
            super().__init__()
            self.net[7] = nn.LazyLinear(3)

    trainer = make_trainer(PlModule, tmp_path, WeightNormTracker())
    message = "net.7.weight has no shape yet and is not recorded: run a batch through the model bef"
    with pytest.warns(UserWarning, match=message) as caught:
        trainer.fit(Lazy(), make_data())
    assert sum("no shape yet" in str(warning.message) for warning in caught) == 1
    assert list(NormHistory.load(tmp_path).norms) == NAMES[:2]


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "step", None])
def test_bad_every_is_refused(every: Any) -> None:
    with pytest.raises(
        InputError, match=f"every is 'epoch' or a number of steps from 1 on, got {every!r}"
    ):
        WeightNormTracker(every)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("make", MODULES)
@pytest.mark.parametrize("every", ["epoch", 1, 3])
@pytest.mark.parametrize(("step", "end"), [(5, "batch"), (6, "batch"), (8, "epoch")])
def test_resume_continues_the_records(
    make: Any, every: Any, step: int, end: str, tmp_path: Path
) -> None:
    """Between two records, too, without an extra one; another file stays as it was."""

    def run(folder: Path, start: Path | None = None) -> NormHistory:
        callbacks = WeightNormTracker(every), SaveAt(step, at, f"on_train_{end}_end")
        make_trainer(make, folder, *callbacks).fit(make(), make_data(), ckpt_path=start)
        return NormHistory.load(tmp_path / "whole")

    at = tmp_path / "at.ckpt"
    whole = run(tmp_path / "whole")
    assert run(tmp_path / "again", at).steps[-1] == EPOCHS * BATCHES
    resumed = NormHistory.load(tmp_path / "again")
    assert resumed.steps.tolist() == whole.steps.tolist()
    assert resumed.epochs.tolist() == whole.epochs.tolist()
    if step == 2 * BATCHES:  # else the rest of the epoch has other batches
        np.testing.assert_array_equal(resumed.norms[NAMES[0]], whole.norms[NAMES[0]])
    np.testing.assert_array_equal(resumed.learning_rates, whole.learning_rates)


def test_killed_run_keeps_finished_epochs(tmp_path: Path) -> None:
    class Dies(PlModule):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            if self.trainer.global_step == 10:
                raise RuntimeError("out of memory")
            return super().training_step(batch, index)

    with pytest.raises(RuntimeError, match="out of memory"):
        make_trainer(PlModule, tmp_path, WeightNormTracker(1)).fit(Dies(), make_data())
    history = NormHistory.load(tmp_path)
    assert history.steps.tolist() == list(range(9))
    assert history.provenance["finished"] is False


@pytest.mark.parametrize("make", MODULES)
def test_tracker_steers(make: Any, tmp_path: Path) -> None:
    record(tmp_path / "reference", make, weight_decay=0.05)
    tracker = WeightNormTracker(steering=LRCorrection(tmp_path / "reference"))
    make_trainer(make, tmp_path / "steered", tracker).fit(make(), make_data())
    history = NormHistory.load(tmp_path / "steered")
    for name in NAMES[:2]:
        np.testing.assert_allclose(history.norms[name], history.norms[name][[0] * 4], rtol=1e-5)
    free = record(tmp_path / "free", make)
    assert not np.allclose(free.norms[NAMES[1]][-1], history.norms[NAMES[1]][-1])


def test_tracker_ends_steering_with_the_fit(tmp_path: Path) -> None:
    tracker = WeightNormTracker(steering=DecayEquivalentLR(0.01))
    trainer = make_trainer(PlModule, tmp_path, tracker)
    trainer.fit(PlModule(), make_data())
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


@pytest.mark.parametrize(
    "computed", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm]
)
def test_tracker_records_what_computes_and_advances_nothing(computed: Any, tmp_path: Path) -> None:
    states = []
    for folder in (tmp_path / "plain", tmp_path / "tracked"):
        module = PlModule()
        computed(module.net[0])
        trackers = [WeightNormTracker(every=1)] * (folder.name == "tracked")
        make_trainer(PlModule, folder, *trackers, max_epochs=2).fit(module, make_data())
        states.append(module.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    norms = NormHistory.load(tmp_path / "tracked").norms
    module.net.eval()(torch.randn(2, 2, 8, 8))
    assert norms["net.0.weight"][-1] == pytest.approx(channel_norms(module.net[0].weight).numpy())
    (behind,) = (q for n, q in module.named_parameters() if n.startswith("net.0.") and q.dim() > 1)
    assert norms["net.0.weight_v"][-1] == pytest.approx(channel_norms(behind).numpy())
    assert not np.allclose(norms["net.0.weight"], norms["net.0.weight_v"])


def test_tracker_names_left_matrices(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Bilinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.eye(3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.matrix

    module = PlModule()
    module.net.append(Bilinear())
    tracker = WeightNormTracker()
    with caplog.at_level("INFO"):
        make_trainer(PlModule, tmp_path, tracker, max_epochs=1).fit(module, make_data())
    assert tracker.left == {"net.8.matrix": "Bilinear is not a known layer"}
    line = "WeightNormTracker does not record net.8.matrix (Bilinear is not a known layer)"
    assert line in caplog.text


class Elsewhere(DummyLogger):
    """A logger like wandb's: it has a folder to save in, a name and a version, and no log_dir."""

    save_dir, name, version = "logs", "project", "abc"


@pytest.mark.parametrize(
    ("options", "folders"),
    [
        ({}, ["lightning_logs/version_0", "lightning_logs/version_1"]),
        ({"default_root_dir": "."}, [".", "."]),
        ({"default_root_dir": "root"}, ["root", "root"]),
        ({"logger": Elsewhere()}, ["logs/project/abc"] * 2),
    ],
    ids=["nothing given", "here", "a root", "a logger without a folder of its own"],
)
def test_tracker_writes_where_it_is_asked_to_and_says_so(
    options: dict[str, Any],
    folders: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, folder in enumerate(folders):
        caplog.clear()
        with caplog.at_level("INFO"):
            trainer = lightning_modules.make_trainer(PlModule, WeightNormTracker(), **options)
            trainer.fit(PlModule(), make_data())
        name = "weight_norms-v1.safetensors" if number and len({*folders}) < 2 else FILE_NAME
        assert Path(folder, name).is_file()
        lines = [r.getMessage() for r in caplog.records if "safetensors" in r.getMessage()]
        said = [Path(line.partition(" are in ")[2]).resolve() for line in lines]
        assert said == [Path(folder, name).resolve()]
