"""What every callback that changes a model keeps: resumes, refusals, averages, strategies."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_modules import ALL, BOTH, fit, make, package_of
from nmlightning import channel_norms
from nmlightning.callbacks import ExactResume, Int8Swap, NormSwap, WeightNormSwap, WeightNormTracker
from nmlightning.errors import InputError
from recorded_runs import Trains, make_data
from trainers import quiet_trainer

SWAPS: dict[str, Any] = {
    "top10": partial(NormSwap, "top10"),
    "mean": partial(NormSwap, "mean"),
    "weight norm": partial(WeightNormSwap, "weight", p=1, project=True),
    "bounded": partial(WeightNormSwap, p=1),
    "int8": partial(Int8Swap, gradient_bits=2),
}
EACH = pytest.mark.parametrize("name", SWAPS)


def types(module: nn.Module) -> list[str]:
    return [type(each).__name__ for each in module.modules() if hasattr(each, "weight")]


@ALL
@EACH
def test_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    name: str, module_class: type, tmp_path: Path
) -> None:
    def run(epochs: int, start: Path | None = None) -> Any:
        module = make(module_class)
        torch.manual_seed(7)  # of a net that is built late, and of stochastic rounding
        trainer = fit(module, ExactResume(), SWAPS[name](), max_epochs=epochs, ckpt_path=start)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    run(1)
    whole = run(3)
    resumed = run(3, tmp_path / "1.ckpt")
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert types(resumed) == types(whole)


NORMS = NormSwap("l1")
OTHERS: list[tuple[list[Any], list[Any], str]] = [
    ([NORMS], [NormSwap("linf")], "norm = 'l1' on net.1, this run has norm = 'linf'. Resume wi"),
    ([NORMS], [NormSwap("l1", {"constant": "none"})], "constant = 'exact' on net.1, this run has"),
    ([WeightNormSwap()], [WeightNormSwap(p=1)], "p = 2.0 on net.0.weight, this run has p = 1"),
    (
        [WeightNormSwap(), NORMS],
        [NORMS],
        "kind = 'bounded' on net.0.weight, this run has no weight norm",
    ),
    ([], [WeightNormSwap()], "no weight norm on net.0.weight, this run has kind = 'bounded'"),
    ([Int8Swap()], [Int8Swap(gradient_bits=4)], "gradient_bits = 8 on net.0, this run has gradie"),
    ([Int8Swap()], [Int8Swap(exclude=["net.0"])], "bits = 8 on net.0, this run has no int8"),
    ([Int8Swap()], [Int8Swap(norms="l1")], "norm = 'range' on net.1, this run has norm = 'l1'"),
    ([Int8Swap()], [Int8Swap(norms=None)], "bits = 8 on net.1, this run has no int8"),
    ([], [Int8Swap()], "no int8 on net.0, this run has bits = 8. Resume with the same Int8Sw"),
]


@BOTH
@pytest.mark.parametrize(("then", "now", "message"), OTHERS)
def test_resume_with_other_settings_is_refused(
    then: list[Any], now: list[Any], message: str, module_class: type, tmp_path: Path
) -> None:
    path, module = tmp_path / "a.ckpt", make(module_class)
    fit(make(module_class), *map(copy.deepcopy, then)).save_checkpoint(path)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(InputError, match="The checkpoint was trained with " + message):
        fit(module, *map(copy.deepcopy, now), max_epochs=2, ckpt_path=path)
    assert torch.equal(before["net.7.weight"], module.state_dict()["net.7.weight"])


AVERAGES: dict[str, dict[str, Any]] = {
    "EMAWeightAveraging": {"decay": 0.5},
    "StochasticWeightAveraging": {"swa_lrs": 0.05, "swa_epoch_start": 1},
}


@BOTH
@EACH
@pytest.mark.parametrize("averaging", AVERAGES)
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that")
def test_averaging_callbacks_average_a_changed_copy(
    order: int, averaging: str, name: str, module_class: type
) -> None:
    average = getattr(package_of(module_class).callbacks, averaging)(**AVERAGES[averaging])
    module, callbacks = make(module_class), [average, SWAPS[name]()]
    fit(module, *callbacks[::order], max_epochs=3)
    copied = average._average_model
    copied = getattr(copied, "module", copied)
    assert copied is not module
    assert types(copied) == types(module) != types(make(module_class))
    # When training ends, it becomes the model.
    for averaged, trained in zip(copied.modules(), module.modules(), strict=True):
        if isinstance(
            getattr(trained, "weight", None), torch.Tensor
        ):  # of a projected one v may have another length
            torch.testing.assert_close(averaged.weight, trained.weight, rtol=1e-6, atol=0)
    if name == "bounded":
        norms = channel_norms(module.net[0].weight, 1)
        torch.testing.assert_close(norms, norms[:1].expand(4), rtol=1e-6, atol=0)
    if averaging.startswith("Stochastic") and name == "top10":
        # It takes the running statistics anew, over one epoch, and puts momentum back.
        assert module.net[1].num_batches_tracked == 4
        assert module.net[1].momentum == 0.1
        assert module.net[1].running_var.isfinite().all()


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (NormSwap, {"options": {"konstant": "paper"}}, "no option 'konstant'.* Did you mean 'constan"),
    (NormSwap, {"kinds": "layer", "types": {"a.B": "group"}}, r"kind of a\.B in types is"),
    (WeightNormSwap, {"kind": "bound"}, "kind is 'bounded' or 'weight'"),
    (WeightNormSwap, {"p": 3}, "p is 1, 2 or inf, got 3"),
    (WeightNormSwap, {"include": "net.*"}, "include is a list"),
    (Int8Swap, {"bits": 1}, "bits is a whole number"),
    (Int8Swap, {"norms": "lx"}, "There is no norm 'lx'"),
    (Int8Swap, {"include": "net"}, "include is a list"),
    (Int8Swap, {"sync": 2}, "sync is True or False"),
    (WeightNormTracker, {"steering": "LRCorrection"}, "steering is a rule, .* got 'LRCorrection'"),
]


@pytest.mark.parametrize(("swap", "options", "message"), BAD)
def test_arguments_are_checked_at_once(swap: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        swap(**options)


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn", "ddp_notebook"])
@pytest.mark.parametrize(
    "callback", [NormSwap("l1"), Int8Swap(), WeightNormSwap(), WeightNormTracker()]
)
def test_strategies_that_train_copies_are_refused(strategy: str, callback: Any) -> None:
    trainer = quiet_trainer(callback, strategy=strategy, devices=2)
    named = "ddp_fork" if strategy == "ddp_notebook" else strategy
    # In this process: one of a worker comes at the end of its traceback, in torch's exception.
    with pytest.raises(InputError, match=f'{strategy}.*copies.*strategy="ddp"') as caught:
        trainer.fit(Trains(), make_data())
    assert named in str(caught.value)
    # Torch pickles no parametrized module, so none that is normalised reaches a spawned process.
    offered = isinstance(callback, NormSwap | Int8Swap) or (
        isinstance(callback, WeightNormSwap) and strategy != "ddp_spawn"
    )
    assert ("change(module)" in str(caught.value)) == offered


@pytest.mark.parametrize("make", [partial(NormSwap, "l1"), Int8Swap, WeightNormSwap])
def test_change_before_the_fit_passes_a_strategy_that_copies(make: Any) -> None:
    module = Trains()
    make().change(module)
    before = copy.deepcopy(module.state_dict())
    quiet_trainer(make(), strategy="ddp_fork", devices=2).fit(module, make_data())
    assert any(not torch.equal(before[name], q) for name, q in module.named_parameters()), "trained"
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    assert set(checkpoint["nmlightning"]) > {"version"}
