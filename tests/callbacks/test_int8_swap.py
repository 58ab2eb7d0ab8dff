"""Test Int8Swap on LightningModules of both Lightning packages, which know nothing of it."""

import copy
import logging
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from lightning_modules import ALL, BOTH, PlModule, UnifiedModule, fit, make, make_data
from nmlightning import load_from_checkpoint, remove_int8, swap_int8
from nmlightning.callbacks import Int8Swap, NormSwap, WeightNormSwap, WeightNormTracker
from nmlightning.errors import InputError
from nmlightning.int8.ranges import describe_int8
from nmlightning.norms import L1BatchNorm2d, RangeBatchNorm2d

NAMES = ["net.0", "net.1", "net.3", "net.4", "net.7"]


def types(module: nn.Module) -> list[type]:
    return [type(module.get_submodule(name)) for name in NAMES]


def assert_same(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


@ALL
@pytest.mark.parametrize("only_weights", [False, True])
def test_trains_and_a_checkpoint_restores_it(
    module_class: type, only_weights: bool, tmp_path: Path
) -> None:
    module, path = make(module_class), tmp_path / "a.ckpt"
    swap = Int8Swap(gradient_bits=4, weight_gradient="bfloat16", exclude=["net.7"])
    trainer = fit(module, swap, WeightNormTracker(), default_root_dir=tmp_path)
    assert list(describe_int8(module)) == NAMES[:-1]
    assert type(module.net[1]) is RangeBatchNorm2d
    trainer.save_checkpoint(path, weights_only=only_weights)
    kept = torch.load(path, weights_only=True)["nmlightning"]["int8"]
    assert kept == describe_int8(module)
    if module_class in (PlModule, UnifiedModule):
        loaded = load_from_checkpoint(module_class, path)
        assert describe_int8(loaded) == describe_int8(module)
        x = torch.randn(2, 2, 8, 8)
        assert torch.equal(loaded.net.eval()(x), module.net.eval()(x))
        assert_same(loaded, module)
        assert types(loaded) == types(module)
    trainer.test(make(module_class), make_data(), path)


def test_swap_by_hand_is_kept_too(tmp_path: Path) -> None:
    module = make(PlModule)
    swap_int8(module.net, bits=6)
    fit(module).save_checkpoint(tmp_path / "a.ckpt")
    assert describe_int8(load_from_checkpoint(PlModule, tmp_path / "a.ckpt"))["net.0"]["bits"] == 6
    fit(make(PlModule), Int8Swap(bits=6), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    module = make(PlModule)
    swap_int8(module)
    fit(module).save_checkpoint(tmp_path / "b.ckpt")
    content = torch.load(tmp_path / "b.ckpt", weights_only=True)
    del content["state_dict"]._metadata  # as strategies lose that shard a model
    torch.save(content, tmp_path / "b.ckpt")
    assert_same(load_from_checkpoint(PlModule, tmp_path / "b.ckpt"), module)
    assert types(load_from_checkpoint(PlModule, tmp_path / "b.ckpt")) == types(module)


@pytest.mark.usefixtures("_one_process")
def test_sync_batchnorm_shares_ranges_and_keeps_norms() -> None:
    module = make(PlModule)
    options = {"sync_batchnorm": True, "strategy": "ddp", "limit_val_batches": 0}
    with mock.patch.dict(os.environ):  # where Lightning leaves the rank, for later processes, too
        fit(module, Int8Swap(norms="l1"), **options)
    assert {type(module.net[place]) for place in (1, 4)} == {L1BatchNorm2d}
    assert all(note["sync"] for note in describe_int8(module).values())
    assert module.net[1].sync


SWAPS = [NormSwap("l1"), WeightNormSwap(), Int8Swap()]


@BOTH
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_goes_with_the_other_swaps(module_class: type, order: Any, tmp_path: Path) -> None:
    module = make(module_class)
    swaps = [copy.deepcopy(SWAPS[place]) for place in order]
    fit(module, *swaps, max_epochs=2).save_checkpoint(tmp_path / "a.ckpt")
    assert type(module.net[1]) is L1BatchNorm2d
    assert list(describe_int8(module)) == NAMES
    assert module.net[0].num_ranges_tracked == 8
    assert "parametrizations" in dict(module.net[0].named_children())
    loaded = load_from_checkpoint(module_class, tmp_path / "a.ckpt")
    assert_same(loaded, module)
    fit(make(module_class), *map(copy.deepcopy, swaps), max_epochs=3, ckpt_path=tmp_path / "a.ckpt")


class Replaces(Int8Swap):
    """Puts a plain layer in the place of one that was swapped."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        pl_module.net[0] = nn.Conv2d(2, 4, 3)


class ReadsAWeight(PlModule):
    """Multiplies by a layer's weight itself."""

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        hidden = self.net[:-1](batch[0])
        return nn.functional.cross_entropy(hidden @ self.net[-1].weight.T, batch[1])


def test_what_does_not_compute_in_int8_is_said() -> None:
    module = make(PlModule)
    before = module.net[3].weight.clone()
    with pytest.raises(InputError, match=r"Int8Swap made net.0 Int8Conv2d, but it is Conv2d: so"):
        fit(module, Replaces())
    assert torch.equal(module.net[3].weight, before), "no step was taken with it"
    message = r"made net.0 Int8Conv2d\(bits=8\), but it is Int8Conv2d\(bits=4\): give each layer"
    with pytest.raises(InputError, match=message):
        fit(make(PlModule), Int8Swap(), Int8Swap(bits=4))
    with pytest.warns(UserWarning, match=r"nothing called net.7 in the first batch"):
        fit(make(ReadsAWeight), Int8Swap(), limit_val_batches=0)


@BOTH
def test_logs_what_it_did_and_what_computes(module_class: type, caplog: Any) -> None:
    with caplog.at_level(logging.INFO):
        fit(make(module_class), Int8Swap())
        fit(make(module_class), NormSwap("linf"), Int8Swap(norms=None))
    lines = [x for x in caplog.messages if x.startswith("Int8Swap")]
    assert lines[0] == (
        "Int8Swap: swapped 2 Conv2d → Int8Conv2d, 1 Linear → Int8Linear, "
        "2 BatchNorm2d → quantised RangeBatchNorm2d"
    )
    assert lines[1].startswith("Int8Swap: 2 Int8Conv2d by ")
    assert len(lines) == 6


def test_repr_and_state_key_have_the_settings() -> None:
    assert repr(Int8Swap(gradient_bits=4)).startswith("Int8Swap(bits=8, gradient_bits=4, ")
    keys = {Int8Swap().state_key, Int8Swap(include=["a"]).state_key, Int8Swap(bits=4).state_key}
    assert len(keys) == 3


def test_a_module_is_made_plain_again_after_training() -> None:
    module = make(PlModule)
    fit(module, Int8Swap())
    remove_int8(module)
    assert types(module) == types(make(PlModule))
    fit(module)
