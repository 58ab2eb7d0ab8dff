"""Test that a checkpoint of a swapped model loads without a Trainer, for both packages."""

import re
from pathlib import Path
from typing import Any

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules import BuildsLate, Classifies, make_trainer
from nmlightning import load_from_checkpoint, swap_like, swap_norms
from nmlightning.callbacks import NormSwap
from nmlightning.errors import InputError


class Remembers(Classifies):
    """Has hyper-parameters, and a norm with an activation inside."""

    def __init__(self, width: int = 4, where: Any = None) -> None:
        self.width = width
        super().__init__()
        self.save_hyperparameters()

    def build(self) -> None:
        norms = [nn.BatchNorm2d(self.width), timm.layers.BatchNormAct2d(3)]
        convs = [nn.Conv2d(2, self.width, 3), nn.Conv2d(self.width, 3, 3)]
        features = [convs[0], norms[0], nn.Tanh(), convs[1], norms[1]]
        self.net = nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


class PlModule(Remembers, pytorch_lightning.LightningModule):
    pass


class UnifiedModule(Remembers, lightning.pytorch.LightningModule):
    pass


class PlLate(BuildsLate, PlModule):
    pass


def images() -> Tensor:
    return torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(2))


def save(module: Any, path: Path, *swaps: NormSwap, weights_only: bool = False) -> None:
    """Train `module` for two steps, and save it."""
    trainer = make_trainer(type(module), *swaps)
    loader = DataLoader(TensorDataset(images(), torch.arange(8) % 3), batch_size=4)
    trainer.fit(module, loader, loader)
    trainer.save_checkpoint(path, weights_only=weights_only)


def assert_same(one: Any, other: Any) -> None:
    """Compare classes, settings, frozen parameters, and outputs in training and in evaluation."""
    assert repr(one) == repr(other)
    frozen = [[q.requires_grad for q in module.parameters()] for module in (one, other)]
    assert frozen[0] == frozen[1]
    for mode in (False, True):
        torch.testing.assert_close(
            one.train(mode)(images()), other.train(mode)(images()), rtol=0, atol=0
        )


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("module_class", [PlModule, UnifiedModule, PlLate])
def test_load_from_checkpoint_restores_the_trained_module(
    module_class: type, weights_only: bool, tmp_path: Path
) -> None:
    module = module_class()
    swap = NormSwap("topk", {"k": 3, "constant": "paper", "stats_dtype": "float64"})
    save(module, tmp_path / "a.ckpt", swap, weights_only=weights_only)
    loaded = load_from_checkpoint(module_class, tmp_path / "a.ckpt", map_location="cpu")
    assert type(loaded) is module_class
    assert re.search(r"TopKBatchNormAct2d\(\n +3, eps=1e-05, .*k=3", repr(loaded))
    assert_same(loaded, module)


@pytest.mark.parametrize(
    ("swaps", "norm"),
    [
        ([NormSwap("mean")], "MeanOnlyBatchNorm2d(4, "),
        ([NormSwap("l1", {"eps": 0.1}), NormSwap("linf")], "LInfBatchNorm2d(4, eps=0.1, "),
        ([NormSwap("l1"), NormSwap("l2", {"eps": 0.25})], "BatchNorm2d(4, eps=0.25, "),
        ([], "BatchNorm2d(4, eps=1e-05"),
    ],
    ids=["mean only", "in order", "reverted", "without a swap"],
)
def test_load_from_checkpoint_restores_swaps(
    swaps: list[NormSwap], norm: str, tmp_path: Path
) -> None:
    module = PlModule()
    save(module, tmp_path / "a.ckpt", *swaps)
    loaded = load_from_checkpoint(PlModule, tmp_path / "a.ckpt")
    assert repr(loaded.net[1]).startswith(norm)
    assert_same(loaded, module)


@pytest.mark.parametrize("module_class", [PlModule, UnifiedModule])
def test_load_from_checkpoint_restores_swaps_by_hand(module_class: type, tmp_path: Path) -> None:
    module: Any = module_class()
    swap_norms(module.net, "topk", {"k": 3, "eps": 0.1, "stats_dtype": torch.float64})
    swap_norms(module, "linf", include=["*.4"])
    save(module, tmp_path / "a.ckpt", weights_only=True)
    with pytest.warns(UserWarning, match=r"1 topk, 1 linf norms; 2 of them not here \(net\.1 is"):
        module_class.load_from_checkpoint(tmp_path / "a.ckpt")  # type: ignore[attr-defined]
    loaded = load_from_checkpoint(module_class, tmp_path / "a.ckpt")
    assert_same(loaded, module)
    save(loaded, tmp_path / "b.ckpt")
    assert_same(load_from_checkpoint(module_class, tmp_path / "b.ckpt"), loaded)


@pytest.mark.parametrize(
    ("norm", "options", "kinds"),
    [
        ("top10", {"constant": "paper"}, ["batch"]),
        ("lp", {"p": 1.5, "eps": np.float64(0.5)}, ["batch", "layer", "rms"]),
        ("range", {"chunks": 2, "momentum": None, "sync": True}, ["batch"]),
        ("mean", {"stats_dtype": "float16"}, ["batch"]),
        ("half_l2", {}, ["batch"]),
        ("l1", {"constant": 1, "stats_dtype": torch.float64}, ["layer", "rms"]),
        ("scaled", {"eps": 0.5}, ["layer", "rms"]),
    ],
)
def test_swap_like_follows_a_saved_state_dict(
    norm: str, options: Any, kinds: list[str], tmp_path: Path
) -> None:
    def build() -> nn.Module:
        batch_norms = [nn.BatchNorm1d(4), nn.BatchNorm3d(4, affine=False)]
        others = [timm.layers.BatchNormAct2d, timm.layers.LayerNorm2d, timm.layers.RmsNorm]
        plain = [nn.LayerNorm(4), nn.RMSNorm(4)]
        return nn.Sequential(*batch_norms, *plain, *(cls(4) for cls in others))

    net, other = build(), build()
    keys = list(net.state_dict())
    swap_norms(net, norm, options, kinds=kinds)
    torch.save(torch.compile(net).state_dict(), tmp_path / "net.pt")
    state = torch.load(tmp_path / "net.pt", weights_only=True)
    assert list(net.state_dict()) == keys
    assert "swapped" in str(swap_like(other, state))
    assert repr(other) == repr(net)
    assert not swap_like(other, state)
    with pytest.raises(InputError, match=r"without _metadata.* what model.state_dict\(\) return"):
        swap_like(other, dict(state))


def test_loaded_module_saves_its_recipe(tmp_path: Path) -> None:
    save(PlModule(), tmp_path / "a.ckpt", NormSwap("l1"))
    loaded: Any = load_from_checkpoint(PlModule, tmp_path / "a.ckpt")
    swap_norms(loaded, "linf", include=["net.1"])
    save(loaded, tmp_path / "b.ckpt")
    norms = torch.load(tmp_path / "b.ckpt")["nmlightning"]["norms"].values()
    assert [note["norm"] for note in norms] == ["LInfBatchNorm2d", "L1BatchNorm2d"]


def test_load_from_checkpoint_passes_arguments(tmp_path: Path) -> None:
    save(PlModule(width=5), tmp_path / "a.ckpt", NormSwap("l1"))
    assert load_from_checkpoint(PlModule, str(tmp_path / "a.ckpt")).width == 5
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_from_checkpoint(PlModule, tmp_path / "a.ckpt", width=6)


def test_load_from_checkpoint_loads_object_hyper_parameters(tmp_path: Path) -> None:
    save(PlModule(where=Path("data")), tmp_path / "a.ckpt", NormSwap("l1"))
    loaded = load_from_checkpoint(PlModule, tmp_path / "a.ckpt", weights_only=False)
    assert "L1BatchNorm2d" in repr(loaded)


@pytest.mark.parametrize("norm", ["l1", "mean"])
def test_swapped_checkpoint_loads_into_the_plain_model(norm: str, tmp_path: Path) -> None:
    module = PlModule()
    save(module, tmp_path / "a.ckpt", NormSwap(norm))
    with pytest.warns(UserWarning, match="net.1 is l2, .*nmlightning.load_from_checkpoint"):
        plain = PlModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert type(plain.net[1]) is nn.BatchNorm2d
    torch.testing.assert_close(plain.eval()(images()), module.eval()(images()))
    swap_norms(module, "l2")
    assert_same(plain, module)
