"""A recording is compared with the optimizers of the run that follows it."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from nmlightning.callbacks.steering import check_same_optimizer
from nmlightning.weights.history import NormHistory

SGD = {"name": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


def make_history(decay: float = 5e-4, *optimizers: dict[str, Any]) -> NormHistory:
    return NormHistory.from_arrays(
        {"weight": [[1.0]], "head.weight": [[1.0]]},
        [10],
        [0],
        weight_decays=[[decay, 5e-4]],
        provenance={"optimizers": list(optimizers)} if optimizers else {},
    )


def make_sgd(rate: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Conv2d(1, 1, 1).parameters(), lr=rate, momentum=0.9)


@pytest.mark.parametrize(
    "history",
    [make_history(5e-4, SGD), make_history(torch.nan), make_history(5e-4, {"name": "SGD"})],
)
def test_same_or_unknown_optimizer_passes(history: NormHistory) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_same_optimizer(history, ["weight"], [make_sgd()])


def test_other_learning_rate_warns() -> None:
    message = "a run with learning rate 0.1, and this one has 0.05; if intended"
    with pytest.warns(UserWarning, match=message):
        check_same_optimizer(make_history(5e-4, SGD), ["weight"], [make_sgd(0.05)])


def test_recording_without_weight_decay_warns() -> None:
    with pytest.warns(UserWarning, match="a run without weight decay on weight, so there is none"):
        check_same_optimizer(make_history(0.0, SGD), ["weight"], [make_sgd()])
