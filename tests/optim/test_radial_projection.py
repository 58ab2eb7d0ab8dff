"""RadialProjection against ports of SGDP and AdamP, and the steps that it leaves alone."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from nmlightning.optim import RadialProjection
from nmlightning.weights.channel_norms import ChannelLayout
from optim_rules import find_loss

Array = NDArray[np.float64]
RATE, STEPS = 0.05, 50


class Net(nn.Module):
    """Under its norms a convolution is invariant by channels, a linear layer only as a whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4, eps=1e-30)
        self.linear = nn.Linear(4, 5, bias=False)
        self.layer_norm = nn.LayerNorm(5, eps=1e-30)
        self.head = nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(F.relu(self.layer_norm(self.linear(x))))


class Port:
    """SGDP and AdamP without weight decay, from the algorithms in the paper, in numpy."""

    def __init__(self, family: str, nesterov: bool, delta: float) -> None:
        self.family, self.nesterov, self.delta = family, nesterov, delta
        self.moments: dict[str, tuple[Array, Array]] = {}
        self.branches: Counter[tuple[str, str]] = Counter()
        self.steps = 0

    def step(self, weights: dict[str, Array], gradients: dict[str, Array]) -> None:
        self.steps += 1
        for name, weight in weights.items():
            direction = self.find_direction(name, gradients[name])
            if weight.ndim > 1:
                direction = self.project(name, weight, gradients[name], direction)
            weight -= RATE * direction

    def find_direction(self, name: str, grad: Array) -> Array:
        first, second = self.moments.setdefault(name, (0 * grad, 0 * grad))
        if self.family == "SGD":
            first[:] = 0.9 * first + grad
            return grad + 0.9 * first if self.nesterov else first
        first[:] = 0.9 * first + 0.1 * grad
        second[:] = 0.999 * second + 0.001 * grad**2
        unbiased = first / (1 - 0.9**self.steps), second / (1 - 0.999**self.steps)
        return unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)

    def project(self, name: str, weight: Array, grad: Array, direction: Array) -> Array:
        channels = list(zip(weight, grad, direction, strict=True))
        if all(self.lies_across(w, g) for w, g, _ in channels):
            self.branches[name, "channels"] += 1
            return np.stack([remove(w, d) for w, _, d in channels])
        if self.lies_across(weight, grad):
            self.branches[name, "layer"] += 1
            return remove(weight, direction)
        self.branches[name, "neither"] += 1
        return direction

    def lies_across(self, w: Array, g: Array) -> bool:
        cosine = np.vdot(w, g) / (np.linalg.norm(w) * np.linalg.norm(g))
        return bool(abs(cosine) < self.delta / math.sqrt(w.size))


def remove(weight: Array, direction: Array) -> Array:
    unit = weight / np.linalg.norm(weight)
    return direction - np.vdot(unit, direction) * unit


@pytest.mark.parametrize("delta", [0.1, 0.5, math.inf])
@pytest.mark.parametrize("family", ["SGD", "Nesterov", "Adam"])
def test_projection_makes_sgdp_and_adamp(family: str, delta: float) -> None:
    net, other = Net(), Net()
    optimizer: torch.optim.Optimizer = torch.optim.Adam(net.parameters(), RATE)
    if family != "Adam":
        nesterov = family == "Nesterov"
        optimizer = torch.optim.SGD(net.parameters(), RATE, momentum=0.9, nesterov=nesterov)
    RadialProjection(delta=delta).attach(optimizer, net.named_parameters())
    port = Port("Adam" if family == "Adam" else "SGD", family == "Nesterov", delta)
    weights = {name: q.detach().numpy() for name, q in other.named_parameters()}
    for step in range(STEPS):
        optimizer.zero_grad()
        find_loss(net, step).backward()
        gradients = torch.autograd.grad(find_loss(other, step), list(other.parameters()))
        optimizer.step()
        port.step(weights, dict(zip(weights, (g.numpy() for g in gradients), strict=True)))
    for name, q in net.named_parameters():
        np.testing.assert_allclose(q.detach(), weights[name], rtol=0, atol=1e-12, err_msg=name)
    assert port.branches["conv.weight", "channels"] == STEPS
    if delta == 0.1:
        assert port.branches["linear.weight", "layer"] > STEPS / 2
        assert port.branches["head.weight", "neither"] > STEPS / 2
    if delta == math.inf:
        assert port.branches["head.weight", "channels"] == STEPS


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


def test_projection_by_channels() -> None:
    """cos = 0.05 and 0.03, both below 0.1 / √2."""
    step, handle = step_once(WEIGHT, np.array([[0.05, 1.0], [2.0, 0.06]]))
    torch.testing.assert_close(step, torch.tensor([[0.0, -1.0], [-2.0, 0.0]]).double())
    left = torch.tensor([1 / math.hypot(0.05, 1), 2 / math.hypot(2, 0.06)]).double()
    torch.testing.assert_close(handle.factors()["weight"], left)
    assert handle.skipped == 0


def test_projection_of_the_whole_weight() -> None:
    """The channels' shares, 2 · 1 and 1 · −2, cancel, so that nothing is along the whole."""
    step, handle = step_once(WEIGHT, np.array([[1.0, 1.0], [0.0, -1.99]]))
    along = 0.01 / 5 * WEIGHT
    expected = -np.array([[1.0, 1.0], [0.0, -1.99]]) + along
    torch.testing.assert_close(step, torch.tensor(expected))
    assert handle.skipped == 0


def test_projection_of_neither() -> None:
    grad = np.array([[1.0, 1.0], [0.0, 1.0]])
    step, handle = step_once(WEIGHT, grad)
    assert torch.equal(step, -torch.tensor(grad))
    assert handle.factors()["weight"].tolist() == [1.0, 1.0]


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
