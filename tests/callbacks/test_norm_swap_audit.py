"""Test that no hook turns a swapped norm back into L2 unseen, under both Lightning packages."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules import PlModule, UnifiedModule, make, make_trainer, norm_types, package_of
from nmlightning.callbacks import NormSwap
from nmlightning.errors import InputError

REPLACED = (
    r"NormSwap made net\.1 a L1BatchNorm2d, but it is SyncBatchNorm: .* after the swap; Train"
)
HOOKS = {
    "setup",
    "on_fit_start",
    "on_sanity_check_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_backward",
    "on_train_batch_end",
}
OF_MODULES = HOOKS - {"on_sanity_check_start"} | {"configure_optimizers", "training_step"}
TOO_EARLY = {"configure_model", "prepare_data"}  # Lightning swaps after these


def convert(module: Any) -> None:
    """Do what a user does who wants synchronised batch norms."""
    module.net = nn.SyncBatchNorm.convert_sync_batchnorm(module.net)


def converting(base: type, hook: str) -> Any:
    """Return a subclass of a callback or module that converts in one of its hooks."""

    def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
        convert(self if isinstance(self, nn.Module) else args[1])
        return getattr(base, hook)(self, *args, **kwargs)

    return type("Converting", (base,), {hook: replacement})


def batches() -> DataLoader[tuple[Tensor, ...]]:
    images = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(images, torch.arange(8) % 3), batch_size=4)


def fit(module: Any, *callbacks: Any) -> Any:
    trainer = make_trainer(type(module), *callbacks)
    trainer.fit(module, batches(), batches())
    return trainer


BOTH = pytest.mark.parametrize("module_class", [PlModule, UnifiedModule])


@BOTH
@pytest.mark.parametrize("hook", sorted(OF_MODULES))
def test_a_module_that_converts_is_refused(module_class: type, hook: str) -> None:
    with pytest.raises(InputError, match=REPLACED):
        fit(make(converting(module_class, hook)), NormSwap("l1"))


@BOTH
@pytest.mark.parametrize("hook", sorted(TOO_EARLY))
def test_a_module_that_converts_before_the_swap_has_its_norms(
    module_class: type, hook: str
) -> None:
    module = make(converting(module_class, hook))
    fit(module, NormSwap("l1"))
    assert [cls.__name__ for cls in norm_types(module)] == ["L1BatchNorm"] * 2
    assert module.net[1].sync


@BOTH
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("hook", sorted(HOOKS))
def test_a_callback_that_converts_is_refused(module_class: type, hook: str, last: bool) -> None:
    other, swap = converting(package_of(module_class).Callback, hook)(), NormSwap("l1")
    module = make(module_class)
    if hook == "setup" and not last:  # it comes before the swap then
        fit(module, other, swap)
        assert [cls.__name__ for cls in norm_types(module)] == ["L1BatchNorm"] * 2
        return
    with pytest.raises(InputError, match=REPLACED):
        fit(module, *([swap, other] if last else [other, swap]))


def test_nothing_is_learned_with_another_norm() -> None:
    module = make(converting(PlModule, "on_train_batch_start"))
    before = module.net[0].weight.detach().clone()
    with pytest.raises(InputError, match=REPLACED):
        fit(module, NormSwap("l1"))
    assert torch.equal(module.net[0].weight, before)


@BOTH
@pytest.mark.parametrize("verb", ["validate", "test"])
def test_a_converted_norm_measures_the_same(module_class: type, verb: str) -> None:
    """Evaluation is that of torch's own batch norm, so it needs no audit."""
    module = make(module_class)
    fit(module, NormSwap("l1"))
    losses = []
    for hook in ("on_exception", f"on_{'validation' if verb == 'validate' else verb}_start"):
        other = converting(package_of(module_class).Callback, hook)()
        trainer = make_trainer(module_class, NormSwap("l1"), other)
        losses += getattr(trainer, verb)(module, batches(), verbose=False)
    assert [cls.__name__ for cls in norm_types(module)] == ["SyncBatchNorm"] * 2
    assert losses[0] == losses[1]
