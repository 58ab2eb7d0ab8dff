"""Hyperball against its definition: the norm held, the length of a step, weights left alone."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nmlightning.errors import InputError
from nmlightning.optim import Hyperball
from nmlightning.weights.channel_norms import ChannelLayout
from optim_rules import make_net, train

Array = NDArray[np.float64]
RATE = 0.03
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda q, lr: torch.optim.SGD(q, lr, momentum=0.9, nesterov=True),
    "Adam": torch.optim.Adam,
    "RMSprop": torch.optim.RMSprop,
    "Rprop": torch.optim.Rprop,
}


def normalise(values: Array) -> Array:
    return values / np.sqrt(np.square(values).sum())


def attach(weight: Tensor, lr: float = RATE, **options: Any) -> tuple[torch.optim.SGD, Any]:
    optimizer = torch.optim.SGD([weight], lr, **options)
    return optimizer, Hyperball().attach(optimizer, [("weight", weight)])


def make_weight(*shape: int, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype))


@pytest.mark.parametrize("family", OPTIMIZERS)
def test_hyperball_definition_around_any_optimizer(family: str) -> None:
    """A free optimizer that is shown the same gradients at the same weights gives u."""
    net, shown = make_net(), make_net()
    optimizer = OPTIMIZERS[family](net.parameters(), lr=RATE)
    free = OPTIMIZERS[family](shown.parameters(), lr=RATE)
    Hyperball().attach(optimizer, net.named_parameters())
    radii = {name: float(q.detach().norm()) for name, q in net.named_parameters()}
    expected = {name: q.detach().numpy().copy() for name, q in net.named_parameters()}

    def follow(_: int) -> None:
        for (name, q), other in zip(net.named_parameters(), shown.parameters(), strict=True):
            other.data = torch.tensor(expected[name])
            other.grad = q.grad
        before = {name: values.copy() for name, values in expected.items()}
        free.step()
        for (name, q), other in zip(net.named_parameters(), shown.parameters(), strict=True):
            after, radius = other.detach().numpy(), radii[name]
            expected[name] = after.copy()
            if q.dim() > 1:
                moved = before[name] - RATE * radius * normalise(before[name] - after)
                expected[name] = radius * normalise(moved)
            np.testing.assert_allclose(q.detach(), expected[name], rtol=1e-9, atol=1e-10)

    train(net, optimizer, 50, each=follow)


def test_norm_and_step_length_are_fixed() -> None:
    """Whatever the size of the gradient: a step before it is put back on the sphere is η R long."""
    weight = make_weight(4, 3)
    optimizer, handle = attach(weight)
    radius = weight.detach().norm()
    for step in range(20):
        before = weight.detach().clone()
        size = 10.0 ** (step % 7 - 3)
        weight.grad = size * make_weight(4, 3).detach().roll(step + 1).sin()
        optimizer.step()
        torch.testing.assert_close(weight.detach().norm(), radius, rtol=1e-14, atol=0)
        factors = (radius / weight.grad.norm()).expand(4)
        torch.testing.assert_close(handle.factors()["weight"], factors, rtol=1e-9, atol=0)
        unit = weight.grad / weight.grad.norm()
        moved = before - RATE * radius * unit
        torch.testing.assert_close(weight.detach(), moved * (radius / moved.norm()))


@pytest.mark.parametrize("reason", ["rate", "gradient", "no gradient"])
def test_unmoved_weight_stays(reason: str) -> None:
    """Not by a bit, although the weight is a little off its sphere."""
    weight = make_weight(4, 3, dtype=torch.float32)
    optimizer, handle = attach(weight, lr=0.0 if reason == "rate" else RATE)
    weight.data *= 1.001
    before = weight.detach().clone()
    if reason != "no gradient":
        weight.grad = torch.full_like(weight, float(reason == "rate"))
    optimizer.step()
    assert torch.equal(weight.detach(), before)
    assert handle.skipped == 0
    assert handle.factors()["weight"].tolist() == [0.0] * 4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nonfinite_step_is_skipped_for_the_whole_weight(bad: float) -> None:
    weight = make_weight(4, 3)
    optimizer, handle = attach(weight)
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    weight.grad[1, 1] = bad
    optimizer.step()
    assert torch.equal(weight.detach(), before)
    assert handle.skipped == 4
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert not torch.equal(weight.detach(), before)
    assert handle.skipped == 4


def test_step_to_zero_and_back() -> None:
    weight = make_weight(1, 1)
    optimizer, _ = attach(weight, lr=1.0)
    weight.grad = weight.detach().clone()
    optimizer.step()
    assert weight.item() == 0.0
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.item() == -make_weight(1, 1).abs().item()


@pytest.mark.parametrize(("size", "word"), [(0.0, "0"), (torch.nan, "nan"), (torch.inf, "inf")])
def test_zero_or_nonfinite_weight_is_refused(size: float, word: str) -> None:
    weight = nn.Parameter(torch.full((2, 3), size))
    with pytest.raises(InputError, match=rf"weight has norm {word}, which Hyperball cannot hold: "):
        attach(weight)


def test_hyperball_leaves_the_optimizers_state() -> None:
    nets = [make_net(), make_net()]
    for net in nets:
        optimizer = torch.optim.SGD(net.parameters(), RATE, momentum=0.9)
        if net is nets[0]:
            Hyperball().attach(optimizer, net.named_parameters())
        train(net, optimizer, 1)
        net.momenta = [optimizer.state[q]["momentum_buffer"] for q in net.parameters()]
    for one, other in zip(*(net.momenta for net in nets), strict=True):
        assert torch.equal(one, other)


def test_resume_holds_the_first_radius() -> None:
    weight = make_weight(4, 3)
    state = attach(weight)[1].state_dict()
    radius = weight.detach().norm()
    weight.data *= 3
    optimizer, handle = attach(weight)
    handle.load_state_dict(state)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach().norm(), radius, rtol=1e-14, atol=0)


def test_transposed_convolution_has_a_factor_for_each_output_channel() -> None:
    """The norm is that of the whole weight."""
    results = []
    for layouts in ({}, {"weight": ChannelLayout(2)}):
        weight = make_weight(4, 3, 2, 2)
        optimizer = torch.optim.SGD([weight], RATE)
        handle = Hyperball().attach(optimizer, [("weight", weight)], layouts)
        weight.grad = make_weight(4, 3, 2, 2).detach().sin()
        optimizer.step()
        results.append(weight.detach())
        assert handle.factors()["weight"].shape == (6 if layouts else 4,)
    torch.testing.assert_close(*results, rtol=1e-14, atol=1e-14)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_is_taken_without_its_default_decay() -> None:
    model = nn.Linear(6, 4, bias=False)
    with pytest.raises(InputError, match=r"weight has weight decay 0.1 in its optimizer"):
        Hyperball().attach(torch.optim.Muon(model.parameters()), model.named_parameters())
    optimizer = torch.optim.Muon(model.parameters(), RATE, weight_decay=0.0)
    Hyperball().attach(optimizer, model.named_parameters())
    before = model.weight.detach().clone()
    for _ in range(5):
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(model.weight.detach().norm(), before.norm())
    assert not torch.allclose(model.weight.detach(), before, atol=0.01)
