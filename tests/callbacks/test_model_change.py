"""Test that strategies whose processes train copies of the module are refused."""

import copy
from functools import partial
from typing import Any

import pytest
import torch

from nmlightning.callbacks import Int8Swap, NormSwap, WeightNormSwap, WeightNormTracker
from nmlightning.errors import InputError
from recorded_runs import Trains, make_data
from trainers import quiet_trainer


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
