"""Test what hangs on undocumented ways of Lightning: copies of the module, ranks, class trees."""

import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from pytorch_lightning.plugins import AsyncCheckpointIO, TorchCheckpointIO, TorchSyncBatchNorm
from torch import nn

from lightning_modules import (
    PlLate,
    PlModule,
    UnifiedLate,
    UnifiedModule,
    fit,
    make,
    make_trainer,
    norm_types,
    package_of,
)
from nmlightning import compat, swap_norms
from nmlightning.callbacks import AtomicCheckpointIO, NormSwap
from nmlightning.norms.batch_norm import L1BatchNorm2d
from trainers import SaveAt


@pytest.mark.parametrize(
    ("module_class", "late"),
    [(PlModule, False), (UnifiedModule, False), (PlLate, True), (UnifiedLate, True)],
)
def test_builds_in_configure_model(module_class: type, late: bool) -> None:
    module = module_class()
    assert compat.builds_in_configure_model(module) is late
    fit(module, NormSwap("l1"))
    assert compat.builds_in_configure_model(module) is late


class Other(TorchCheckpointIO):
    """Somebody's own, which stays."""


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (None, AtomicCheckpointIO),
        (AsyncCheckpointIO(), AtomicCheckpointIO),
        (AsyncCheckpointIO(AsyncCheckpointIO()), AtomicCheckpointIO),
        (AsyncCheckpointIO(Other()), Other),
        (Other(), Other),
    ],
)
def test_our_io_stands_inside_those_that_wrap(given: Any, kept: type) -> None:
    strategy = pytorch_lightning.strategies.SingleDeviceStrategy(checkpoint_io=given)
    compat.replace_torch_io(strategy, AtomicCheckpointIO())
    inner: Any = strategy.checkpoint_io
    assert given in (None, inner)
    while isinstance(inner, AsyncCheckpointIO):
        inner = inner.checkpoint_io
    assert type(inner) is kept


def test_callbacks_belong_to_both_packages() -> None:
    for callback in (compat.CallbackBase(), pickle.loads(pickle.dumps(NormSwap("l1")))):
        assert isinstance(callback, pytorch_lightning.Callback)
        assert isinstance(callback, lightning.pytorch.Callback)


@pytest.mark.parametrize("ema_first", [True, False])
@pytest.mark.parametrize("module_class", [PlModule, UnifiedModule, PlLate])
# It says so whenever it averages a module that has configure_model.
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that")
def test_resumed_run_with_averages_matches_the_uninterrupted_one(
    module_class: type, ema_first: bool, tmp_path: Path
) -> None:
    def callbacks() -> list[Any]:
        ema = package_of(module_class).callbacks.EMAWeightAveraging(decay=0.5)
        return [ema, NormSwap("l1")] if ema_first else [NormSwap("l1"), ema]

    whole, resumed = make(module_class), make(module_class)
    save = SaveAt(4, tmp_path / "a.ckpt", "on_train_epoch_end")
    fit(whole, *callbacks(), save, max_epochs=2)
    fit(resumed, *callbacks(), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert norm_types(resumed) == [L1BatchNorm2d] * 2
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("sync", [True, False])
def test_norms_are_synchronised_where_the_trainer_asks_for_it(sync: bool) -> None:
    module, swap = make(PlModule), NormSwap("l1")
    trainer = make_trainer(PlModule, swap, strategy="ddp", devices=2, sync_batchnorm=sync)
    swap.setup(trainer, module, "fit")
    compat.synchronise_norms(trainer, module)
    assert module.net[1].sync == sync


def test_unswapped_norms_convert_to_sync_batch_norm() -> None:
    """Torch trains its SyncBatchNorm, and wraps it in DDP, on GPUs only; so this does not run."""
    module, swap = make(PlModule), NormSwap("l1", exclude=["net.4"])
    trainer = make_trainer(type(module), swap, strategy="ddp", devices=2, sync_batchnorm=True)
    weight = module.net[1].weight
    for _ in range(2):
        swap.setup(trainer, module, "fit")
    assert type(trainer.strategy._layer_sync.original) is TorchSyncBatchNorm  # wrapped once
    synchronised = trainer.strategy._layer_sync.apply(module)
    assert norm_types(synchronised) == [L1BatchNorm2d, nn.SyncBatchNorm]
    assert synchronised.net[1].sync
    assert synchronised.net[1].weight is weight
    for norm in ("topk", "l2"):  # ours is a SyncBatchNorm, too, and stays
        swap_norms(synchronised, norm, include=["net.4"])
        reverted = trainer.strategy._layer_sync.revert(synchronised)
        assert isinstance(reverted.net[4], nn.SyncBatchNorm) == (norm == "topk")
    assert reverted.net[1].weight is weight
