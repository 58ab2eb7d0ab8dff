"""Scaling a weight scales the state that each of torch's optimizers keeps of it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from nmlightning.optim.parameters import OptimizedWeight

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "Adam": (optim.Adam, {"amsgrad": True}),
    "AdamW": (optim.AdamW, {"weight_decay": 0.0, "amsgrad": True}),
    "NAdam": (optim.NAdam, {}),
    "RAdam": (optim.RAdam, {}),
    "Adamax": (optim.Adamax, {}),
    "RMSprop": (optim.RMSprop, {}),
    "RMSprop, centered": (optim.RMSprop, {"centered": True, "momentum": 0.9}),
    "Adagrad": (optim.Adagrad, {}),
    "Adadelta": (optim.Adadelta, {}),
    "Rprop": (optim.Rprop, {}),
    "ASGD": (optim.ASGD, {"t0": 2}),
}
FACTORS = torch.tensor([0.25, 4.0, 1.0], dtype=torch.float64)


def train(name: str, scale: Tensor, gradients: Tensor) -> OptimizedWeight:
    """Return a weight of scale-invariant channels after steps from `scale` times a start."""
    make, options = OPTIMIZERS[name]
    start = torch.ones(3, 4, dtype=torch.float64) * scale[:, None]
    weight = nn.Parameter(start)
    # Next to these gradients any eps is nothing.
    optimizer = make([weight], lr=1e-2, **options)
    for gradient in gradients:
        weight.grad = gradient / scale[:, None]
        optimizer.step()
    return OptimizedWeight("weight", weight, optimizer, 0)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - {"ASGD"}))
def test_scale_scales_the_optimizers_state(name: str) -> None:
    """Gradients of a scale-invariant weight that is c times as long are 1/c as large."""
    gradients = 1e6 * torch.randn(6, 3, 4, dtype=torch.float64)
    whole = torch.ones(3, dtype=torch.float64)
    scaled, expected = train(name, whole, gradients), train(name, FACTORS, gradients)
    scaled.scale(FACTORS)
    compared = 0
    for key, kept in expected.optimizer.state[expected.parameter].items():
        if isinstance(kept, Tensor) and kept.shape == (3, 4):
            ours = scaled.optimizer.state[scaled.parameter][key]
            torch.testing.assert_close(ours, kept, rtol=1e-9, atol=0, msg=key)
            compared += 1
    assert compared


def test_scale_scales_the_average_of_weights() -> None:
    gradients = torch.randn(6, 3, 4, dtype=torch.float64)
    weight = train("ASGD", torch.ones(3, dtype=torch.float64), gradients)
    before = weight.optimizer.state[weight.parameter]["ax"].clone()
    weight.scale(FACTORS)
    after = weight.optimizer.state[weight.parameter]["ax"]
    torch.testing.assert_close(after, before * FACTORS[:, None])


@pytest.mark.parametrize("shape", [(), (1,), (1, 4), (0,)])
def test_scale_takes_the_mean_for_an_average_over_channels(shape: tuple[int, ...]) -> None:
    """Such as NovoGrad's, which is one number."""
    weight = train("Adam", torch.ones(3, dtype=torch.float64), torch.ones(1, 3, 4))
    average = weight.optimizer.state[weight.parameter]["exp_avg_sq"] = torch.ones(shape).double()
    weight.scale(FACTORS)
    torch.testing.assert_close(average, FACTORS.pow(-2).mean().expand(shape))
