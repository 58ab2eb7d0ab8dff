"""Test that strategies whose processes train copies of the module are refused."""

from functools import partial
from typing import Any

import pytest

from nmlightning.callbacks import NormSwap, WeightNormSwap, WeightNormTracker
from nmlightning.errors import InputError
from recorded_runs import Trains
from trainers import quiet_trainer


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn", "ddp_notebook"])
@pytest.mark.parametrize("callback", [NormSwap("l1"), WeightNormSwap(), WeightNormTracker()])
def test_strategies_that_train_copies_are_refused(strategy: str, callback: Any) -> None:
    trainer = quiet_trainer(callback, strategy=strategy, devices=2)
    module = Trains()
    trainer.strategy.connect(module)  # type: ignore[attr-defined]
    named = "ddp_fork" if strategy == "ddp_notebook" else strategy
    with pytest.raises(InputError, match=f'{strategy}.*copies.*strategy="ddp"') as caught:
        callback.setup(trainer, module, stage="fit")
    assert named in str(caught.value)
    # Torch pickles no parametrized module, so none that is normalised reaches a spawned process.
    offered = isinstance(callback, NormSwap) or (
        isinstance(callback, WeightNormSwap) and strategy != "ddp_spawn"
    )
    assert ("change(module)" in str(caught.value)) == offered


@pytest.mark.parametrize("make", [partial(NormSwap, "l1"), WeightNormSwap])
def test_change_before_the_fit_passes_a_strategy_that_copies(make: Any) -> None:
    module = Trains()
    make().change(module)
    trainer = quiet_trainer(make(), strategy="ddp_fork", devices=2)
    trainer.strategy.connect(module)  # type: ignore[attr-defined]
    trainer.callbacks[0].setup(trainer, module, stage="fit")  # type: ignore[attr-defined]
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    assert set(checkpoint["nmlightning"]) > {"version"}
