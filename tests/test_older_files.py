"""Checkpoints, networks, recordings and configs of version 0.1.0 before its modules were moved.

The files are in `fixtures/older`, where a README says how they were made.
"""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import nmlightning
from nmlightning.cli import main
from nmlightning.surgery.recipes import NORMS, WEIGHTS, recipe_in, what_trains

OLDER = Path(__file__).parent / "fixtures" / "older"
RECORDING = "weight_norms.safetensors"
FULL_PATHS = ["--config", "full_paths.yaml"]
CALLBACKS = "nmlightning.callbacks"
BOUNDED: list[tuple[str, dict[str, Any]]] = [
    (f"{CALLBACKS}.norm_swap.NormSwap", {"norm": "mean"}),
    (f"{CALLBACKS}.weight_norm_swap.WeightNormSwap", {"p": 1, "layers": ["conv", "linear"]}),
]


def callbacks(*entries: tuple[str, dict[str, Any]]) -> list[str]:
    """Return the option that gives the Trainer these callbacks, by class and arguments."""
    given = [{"class_path": name, "init_args": arguments} for name, arguments in entries]
    return ["--trainer.callbacks", json.dumps(given)]


OPTIONS = {"steered": [], "bounded": callbacks(*BOUNDED)}
# What the code that wrote the checkpoints measured: the loss and the accuracy on 360 images.
MEASURED = {"steered": (1.366408, 0.533333), "bounded": (1.576645, 0.441667)}


class Holder(pl.LightningModule):
    """Has objects as hyper-parameters, which its checkpoint holds pickled."""

    def __init__(self, net: nn.Sequential, rules: list[Any], callback: pl.Callback) -> None:
        super().__init__()
        self.save_hyperparameters("rules", "callback")
        self.net = net


@pytest.fixture(autouse=True)
def _in_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go to a copy of the older files, unpacked, the recording where its checkpoint expects it."""
    shutil.copytree(OLDER, tmp_path, dirs_exist_ok=True)
    for packed in tmp_path.glob("*.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    run = tmp_path / "runs" / "steered" / "version_0"
    run.mkdir(parents=True)
    shutil.copy(OLDER / RECORDING, run)
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonargparse, about Lightning
@pytest.mark.parametrize("name", MEASURED)
def test_load_from_checkpoint_restores_an_older_model(name: str) -> None:
    task = nmlightning.load_from_checkpoint(nmlightning.ImageClassifier, f"{name}.ckpt")
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    (metrics,) = trainer.test(task, nmlightning.Digits(batch_size=360), verbose=False)
    loss, accuracy = MEASURED[name]
    assert metrics["test/loss"] == pytest.approx(loss, rel=1e-3)
    assert metrics["test/top1"] == pytest.approx(accuracy, abs=0.004)


@pytest.mark.parametrize("name", MEASURED)
def test_fit_resumes_an_older_checkpoint(name: str) -> None:
    words = [*FULL_PATHS, *OPTIONS[name], "--ckpt_path", f"{name}.ckpt", "--trainer.max_epochs=3"]
    assert main(["fit", *words]) == 0
    (path,) = Path("runs/full_paths").glob("version_*/checkpoints/last.ckpt")
    before, after = (torch.load(file, weights_only=True) for file in (f"{name}.ckpt", path))
    assert (before["global_step"], after["global_step"], after["epoch"]) == (88, 132, 2)
    assert before["state_dict"].keys() == after["state_dict"].keys()
    assert recipe_in(before, WEIGHTS) == recipe_in(after, WEIGHTS)
    norms = [recipe_in(checkpoint, NORMS) for checkpoint in (before, after)]
    trained = [{name: what_trains(note) for name, note in each.items()} for each in norms]
    assert trained[0] == trained[1]
    if name == "steered":
        history = nmlightning.NormHistory.load(path.parents[1])
        assert history.steps.tolist() == [0, 44, 88, 132], "the older records, and one more"


@pytest.mark.parametrize("rule", ["LRCorrection", "NormSchedule"])
def test_an_older_recording_steers(rule: str) -> None:
    history = nmlightning.NormHistory.load(RECORDING)
    assert (history.steps.tolist(), history.provenance["seed"]) == ([0, 44, 88], 1)
    steering = {"class_path": rule, "init_args": {"reference": RECORDING}}
    arguments = {"steering": steering, "other_run": True}  # that had no decay, and has this seed
    words = callbacks(("NormSwap", {"norm": "l1"}), ("WeightNormTracker", arguments))
    assert main(["fit", *FULL_PATHS, *words, "--trainer.max_epochs", "1"]) == 0
    (run,) = Path("runs/full_paths").iterdir()
    assert nmlightning.NormHistory.load(run).norms.keys() == history.norms.keys()


def test_objects_in_an_older_checkpoint_load() -> None:
    holder = nmlightning.load_from_checkpoint(Holder, "pickled.ckpt", weights_only=False)
    names = ("LRCorrection", "NormSchedule", "DecayEquivalentLR", "Hyperball", "RadialProjection")
    for rule, name in zip(holder.hparams["rules"], names, strict=True):
        assert type(rule) is getattr(nmlightning, name)
    assert holder.hparams["rules"][0].reference == "reference"
    assert type(holder.hparams["callback"]) is nmlightning.NormSwap
    assert [type(layer).__name__ for layer in holder.net] == ["Conv2d", "L1BatchNorm2d", "TReLU"]
    assert holder.net(torch.randn(2, 1, 5, 5)).isfinite().all()


@pytest.fixture
def images() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 1, 6, 6)


def test_older_pickled_network_computes_as_before(images: torch.Tensor) -> None:
    older = torch.load("networks.pt", weights_only=False)["swapped"]
    norms = [type(layer).__name__ for layer in older["net"] if "Norm" in type(layer).__name__]
    kinds = ("L1", "TopK", "LInf", "Range", "MeanOnly", "HalfL2", "Lp")
    assert norms == [*(f"{kind}BatchNorm2d" for kind in kinds), "L1LayerNorm", "L1RMSNorm"]
    for output, mode in (("evaluated", False), ("trained", True)):
        # Written by the formula in float32; another CPU may sum in another order.
        expected = torch.tensor(older[output])
        torch.testing.assert_close(older["net"].train(mode)(images), expected, rtol=1e-5, atol=1e-6)


def test_older_state_dict_of_normalised_weights_computes_as_before(images: torch.Tensor) -> None:
    older = torch.load("networks.pt", weights_only=False)["bounded"]
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.ReLU())
    net.extend([nn.Flatten(), nn.Linear(8, 2)])
    for options in older["options"]:
        nmlightning.apply_weight_norm(net, **options)
    net.load_state_dict(older["state_dict"])
    expected = torch.tensor(older["evaluated"])
    torch.testing.assert_close(net.eval()(images), expected, rtol=1e-5, atol=1e-6)
