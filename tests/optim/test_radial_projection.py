"""RadialProjection by hand: what it takes out, and the steps that it leaves alone.

Its numpy port is in test_conditions.py.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nmlightning.optim import RadialProjection
from nmlightning.weights.channel_norms import ChannelLayout

Array = NDArray[np.float64]


def step_once(
    weight: Array, grad: Array, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Tensor, Any]:
    parameter = nn.Parameter(torch.tensor(weight, dtype=dtype))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    handle = RadialProjection(**options).attach(optimizer, [("weight", parameter)])
    parameter.grad = torch.tensor(grad, dtype=dtype)
    optimizer.step()
    return parameter.detach() - torch.tensor(weight, dtype=dtype), handle


WEIGHT = np.array([[2.0, 0.0], [0.0, 1.0]])
NEARLY_ACROSS = np.array([[0.05, 1.0], [2.0, 0.06]])
CANCELLING = np.array([[1.0, 1.0], [0.0, -1.99]])


@pytest.mark.parametrize(
    ("grad", "expected", "left", "delta"),
    [
        # cos = 0.05 and 0.03, both below 0.1 / √2
        (
            NEARLY_ACROSS,
            [[0.0, 1.0], [2.0, 0.0]],
            [1 / math.hypot(0.05, 1), 2 / math.hypot(2, 0.06)],
            0.1,
        ),
        # The channels' shares, 2 · 1 and 1 · −2, cancel, so that nothing is along the whole.
        (CANCELLING, CANCELLING - 0.01 / 5 * WEIGHT, None, 0.1),
        (NEARLY_ACROSS, NEARLY_ACROSS, [1.0, 1.0], 0.02),
        (CANCELLING, [[0.0, 1.0], [0.0, 0.0]], [0.5**0.5, 0.0], math.inf),
    ],
    ids=["channels", "whole", "neither", "any"],
)
def test_projection_by_channels_of_the_whole_or_of_neither(
    grad: Array, expected: Any, left: list[float] | None, delta: float
) -> None:
    step, handle = step_once(WEIGHT, grad, delta=delta)
    torch.testing.assert_close(step, -torch.tensor(expected).double(), rtol=1e-12, atol=1e-15)
    if left:
        torch.testing.assert_close(handle.factors()["weight"], torch.tensor(left).double())
    assert handle.skipped == 0


def test_zero_gradient_is_projected() -> None:
    """Its momentum may not."""
    weight = nn.Parameter(torch.tensor(WEIGHT))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.5)
    RadialProjection().attach(optimizer, [("weight", weight)])
    optimizer.state[weight]["momentum_buffer"] = torch.tensor([[1.0, 1.0], [1.0, 1.0]]).double()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[2.0, -0.5], [-0.5, 1.0]]).double())


def test_zero_weight_is_not_projected() -> None:
    """It has no direction to take anything from; other channels, and the whole, have."""
    step, _ = step_once(np.zeros((2, 2)), np.ones((2, 2)))
    assert torch.equal(step, -torch.ones(2, 2).double())
    step, _ = step_once(np.array([[0.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 1.0], [1.0, 0.01]]))
    torch.testing.assert_close(step, torch.tensor([[-1.0, -1.0], [-1.0, 0.0]]).double())
    weight = np.array([[0.0, 0.0], *WEIGHT])
    grad = np.array([[1.0, 1.0], [1.0, 1.0], [0.0, -1.99]])
    step, _ = step_once(weight, grad)
    torch.testing.assert_close(step, torch.tensor(0.01 / 5 * weight - grad))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_channel_stays(bad: float) -> None:
    step, handle = step_once(WEIGHT, np.array([[bad, 1.0], [2.0, 0.06]]))
    torch.testing.assert_close(step, torch.tensor([[0.0, 0.0], [-2.0, -0.06]]).double())
    assert handle.skipped == 1
    assert handle.factors()["weight"].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_projection_ignores_gradient_size(size: float) -> None:
    """Its squares are beyond float32."""
    weight = nn.Parameter(torch.tensor(WEIGHT, dtype=torch.float32))
    optimizer = torch.optim.SGD([weight], lr=1 / size)
    RadialProjection().attach(optimizer, [("weight", weight)])
    weight.grad = size * torch.tensor([[0.05, 1.0], [2.0, 0.06]])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[2.0, -1.0], [-2.0, 1.0]]))


def test_transposed_convolution_is_projected_by_output_channels() -> None:
    """They lie across the weight."""
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False).double()
    net = nn.Sequential(layer, nn.BatchNorm2d(6, eps=1e-30).double())
    optimizer = torch.optim.SGD([layer.weight], lr=0.01, momentum=0.9)
    layouts = {"weight": ChannelLayout(2)}
    handle = RadialProjection().attach(optimizer, [("weight", layer.weight)], layouts)
    target = torch.randn(2, 6, 7, 7, dtype=torch.float64)
    for _ in range(3):
        before = layer.weight.detach().clone()
        optimizer.zero_grad()
        (net(torch.randn(2, 4, 5, 5, dtype=torch.float64)) * target).sum().backward()
        optimizer.step()
        step = layer.weight.detach() - before
        along = (before * step).view(2, 2, 3, 9).sum((1, 3))  # groups, inputs, outputs, pixels
        torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-13)
        assert float((before * step).abs().sum()) > 1e-3
    assert handle.factors()["weight"].shape == (6,)


def test_weight_without_gradient_stays() -> None:
    weight = nn.Parameter(torch.tensor(WEIGHT))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    handle = RadialProjection().attach(optimizer, [("weight", weight)])
    optimizer.step()
    assert torch.equal(weight.detach(), torch.tensor(WEIGHT))
    assert handle.skipped == 0


def test_sparse_gradients_are_projected_as_dense_ones() -> None:
    results = []
    for sparse in (False, True):
        embedding = nn.Embedding.from_pretrained(torch.tensor(WEIGHT), False, sparse=sparse)
        optimizer = torch.optim.SGD(embedding.parameters(), lr=1.0)
        RadialProjection().attach(optimizer, embedding.named_parameters())
        (embedding(torch.tensor([1])) * torch.tensor([2.0, 0.06])).sum().backward()
        optimizer.step()
        results.append(embedding.weight.detach())
    assert torch.equal(*results)
    torch.testing.assert_close(results[0], torch.tensor([[2.0, 0.0], [-2.0, 1.0]]).double())
