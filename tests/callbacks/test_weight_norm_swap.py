"""Test WeightNormSwap on LightningModules that have never heard of it, under both packages."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning
import torch
from torch import Tensor, nn

from lightning_modules import ALL, BOTH, OwnOptimizer, PlModule, fit, make, make_data, package_of
from nmlightning import (
    LRCorrection,
    NormHistory,
    NormSchedule,
    NormSwap,
    WeightNormSwap,
    WeightNormTracker,
    apply_weight_norm,
    channel_norms,
    load_from_checkpoint,
    remove_weight_norm,
)
from nmlightning.callbacks import weight_norm_swap
from nmlightning.errors import InputError
from nmlightning.kernels.cpu import build
from nmlightning.weights.recording_file import FILE_NAME


class Forgetful(PlModule):
    """Its optimizer has the weights, and no gains."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        named = self.named_parameters()
        return torch.optim.SGD([q for name, q in named if not name.endswith("gain")], lr=0.1)


@BOTH
def test_model_pruning_stands_behind_weight_norm_swap(module_class: type) -> None:
    """It chooses weights in its setup, which are parameters no more after a swap."""
    make_pruning = partial(
        package_of(module_class).callbacks.ModelPruning, "l1_unstructured", amount=0.3
    )
    fit(make(module_class), WeightNormSwap(), make_pruning())
    with pytest.raises(InputError, match="ModelPruning stands before WeightNormSwap"):
        fit(make(module_class), make_pruning(), WeightNormSwap())


def norms_of(module: Any, p: float = 2) -> Tensor:
    return channel_norms(module.net[0].weight, p)


@ALL
@pytest.mark.parametrize("options", [{}, {"p": 1, "project": True}, {"kind": "weight"}])
def test_weight_norm_swap_keeps_the_norms(module_class: type, options: dict[str, Any]) -> None:
    module = make(module_class)
    trainer = fit(module, WeightNormSwap(**options))
    trainer.test(module, make_data(), verbose=False)
    rho = float(module.net[0].parametrizations.weight[0].rho)
    norms = norms_of(module, options.get("p", 2))
    if options.get("kind") == "weight":
        assert norms.std() > 0
    else:
        torch.testing.assert_close(norms, torch.full((4,), rho), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("by", "way_out"),
    [
        (WeightNormSwap, "nmlightning.load_from_checkpoint"),
        (apply_weight_norm, "nmlightning.load_from_checkpoint"),
        (lambda net: torch.nn.utils.parametrizations.weight_norm(net[0]), "in its __init__"),
    ],
)
def test_checkpoint_with_weight_norm_is_refused_by_a_plain_module(
    by: Any, way_out: str, tmp_path: Path
) -> None:
    path, module, callbacks = tmp_path / "a.ckpt", make(PlModule), []
    if by is WeightNormSwap:
        callbacks.append(by())
    else:
        by(module.net)  # which notes nothing on the LightningModule
    fit(module, *callbacks).save_checkpoint(path)
    with pytest.raises(InputError, match=rf"weight norm on net\.0\.weight.*: .*{way_out}"):
        PlModule.load_from_checkpoint(path)


@ALL
@pytest.mark.parametrize(
    ("weights_only", "options"), [(False, {}), (True, {"kind": "weight", "p": "inf", "rho": 2.0})]
)
def test_load_from_checkpoint_restores_weight_norms(
    module_class: Any, weights_only: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    path, again = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    module = make(module_class)
    callbacks = [NormSwap("mean"), WeightNormSwap(**options)]
    fit(module, *callbacks).save_checkpoint(path, weights_only=weights_only)
    load = module_class.load_state_dict
    restored = load_from_checkpoint(module_class, path)
    images = torch.randn(4, 2, 8, 8)
    assert torch.equal(restored.eval().net(images), module.eval().net(images))
    assert module_class.load_state_dict is load
    assert not {"load_state_dict", "on_load_checkpoint"} & vars(module_class).keys()
    fit(restored.train(), *callbacks).save_checkpoint(again)  # which it has already
    saved = torch.load(again)["nmlightning"]["weights"]
    assert saved == torch.load(path)["nmlightning"]["weights"] != {}


@pytest.mark.parametrize("options", [{}, {"kind": "weight", "p": "inf", "rho": 2.0}])
def test_weight_norm_by_hand_is_loaded_and_resumed(options: dict[str, Any], tmp_path: Path) -> None:
    path, module = tmp_path / "a.ckpt", make(PlModule)
    apply_weight_norm(module.net, **options)
    fit(module).save_checkpoint(path)
    restored = load_from_checkpoint(PlModule, path)
    images = torch.randn(4, 2, 8, 8)
    assert torch.equal(restored.eval().net(images), module.eval().net(images))
    fit(restored.train(), ckpt_path=path)
    fit(make(PlModule), WeightNormSwap(**options), ckpt_path=path)
    with pytest.raises(InputError, match=r"on net\.0\.weight, this run has .*same WeightNormSwap"):
        fit(make(PlModule), WeightNormSwap(p=1), ckpt_path=path)


class FromOthers(PlModule):
    """Begins with weights of its own class, has a teacher of it, and a convolution of zeros."""

    plain: Any = None
    normalised: Any = None

    def __init__(self) -> None:
        super().__init__()
        if self.plain is not None:
            self.load_state_dict(torch.load(self.plain)["state_dict"])
            teacher = load_from_checkpoint(PlModule, self.normalised)
            self.__dict__["teacher"] = teacher
        nn.init.zeros_(self.net[3].weight)


def test_load_leaves_other_loads_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, taught, path = (tmp_path / f"{name}.ckpt" for name in ("plain", "taught", "a"))
    fit(make(PlModule)).save_checkpoint(plain)
    teacher, module = make(PlModule), make(FromOthers)
    fit(teacher, WeightNormSwap("weight", p=1)).save_checkpoint(taught)
    nn.init.normal_(module.net[3].weight)
    fit(module, WeightNormSwap()).save_checkpoint(path)
    monkeypatch.setattr(FromOthers, "plain", plain)
    monkeypatch.setattr(FromOthers, "normalised", taught)
    restored = load_from_checkpoint(FromOthers, path)
    for one, other in ((restored, module), (restored.teacher, teacher)):
        assert torch.equal(one.net[3].weight, other.net[3].weight)


def test_weight_norm_swap_adds_gains_to_an_earlier_optimizer() -> None:
    module = make(OwnOptimizer)
    fit(module, WeightNormSwap("weight", rho=1.0, include=["net.7.weight"]))
    gain = module.net[7].parametrizations.weight[0].gain
    assert (gain != 1).all()


def test_weight_norm_swap_warns_of_gains_without_an_optimizer() -> None:
    with pytest.warns(UserWarning, match="No optimizer trains 2 parameters of weight norms"):
        fit(make(Forgetful), WeightNormSwap("weight"))


class Replaces(pytorch_lightning.Callback):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.net[0] = nn.Conv2d(2, 4, 3)


def test_weight_norm_swap_refuses_a_weight_that_was_replaced() -> None:
    with pytest.raises(InputError, match=r"normalised net\.0\.weight, but something replaced"):
        fit(make(PlModule), Replaces(), WeightNormSwap())


def test_tracker_records_both_norms_and_follows_the_unnormalised_one(tmp_path: Path) -> None:
    runs = [tmp_path / "wd_on", tmp_path / "follows"]
    fit(make(PlModule), WeightNormSwap(), WeightNormTracker(), default_root_dir=runs[0])
    history = NormHistory.load(runs[0])
    assert {"net.0.weight", "net.0.weight_v"} <= history.norms.keys()
    assert np.ptp(history.norms["net.0.weight"]) < 1e-6
    shrunk = {
        name: values * np.linspace(1, 0.5, len(values))[:, None] if name.endswith("_v") else values
        for name, values in history.norms.items()
    }
    NormHistory.from_arrays(shrunk, history.steps, history.epochs).save(runs[0] / FILE_NAME)
    tracker = WeightNormTracker(steering=LRCorrection(runs[0]), other_run=True)
    fit(make(PlModule), WeightNormSwap(), tracker, default_root_dir=runs[1])
    (handle,) = tracker.handles
    factors = handle.factors()
    assert len(factors) == 2
    assert all((factor > 1).all() for factor in factors.values())


def test_removed_weight_norms_leave_the_checkpoints(tmp_path: Path) -> None:
    path, module = tmp_path / "a.ckpt", make(PlModule)
    trainer = fit(module, WeightNormSwap())
    remove_weight_norm(module)
    trainer.save_checkpoint(path)
    assert not torch.load(path)["nmlightning"]["weights"]
    load_from_checkpoint(PlModule, path)
    fit(module, WeightNormSwap(p=1)).save_checkpoint(path)
    restored = load_from_checkpoint(PlModule, path)
    assert torch.equal(restored.net[0].weight, module.net[0].weight)


def test_weight_norm_swaps_of_different_weights_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    swaps = [WeightNormSwap(include=["net.0.*"]), WeightNormSwap("weight", include=["net.3.*"])]
    fit(make(PlModule), *swaps).save_checkpoint(path)
    fit(make(PlModule), *reversed(swaps), ckpt_path=path, max_epochs=2)
    load_from_checkpoint(PlModule, path)


def test_norm_schedule_refuses_projected_weights() -> None:
    history = NormHistory.from_arrays({"net.0.weight_v": [[1.0] * 4]}, [3], [0])
    tracker = WeightNormTracker(steering=NormSchedule(history), other_run=True)
    with pytest.raises(InputError, match="NormSchedule sets the norms that project=True sets"):
        fit(make(PlModule), WeightNormSwap(project=True), tracker)


def test_weight_norm_swap_builds_kernels_if_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(weight_norm_swap, "first_missing", lambda _: build.NOT_BUILT)
    monkeypatch.setattr(weight_norm_swap, "start_build", lambda _: "they are being built")
    told, untold = WeightNormSwap(), WeightNormSwap()
    told.builds_kernels = True
    with caplog.at_level(logging.INFO):
        for swap in (told, untold):
            fit(make(PlModule), swap)
    said = [x.getMessage() for x in caplog.records if "formula" in x.getMessage()]
    assert said == ["WeightNormSwap: 2 weights by the formula: they are being built"]
