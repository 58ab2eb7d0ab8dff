"""Hyperball: the norm held, the length of a step, weights left alone.

Its numpy port is in test_conditions.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nmlightning.errors import InputError
from nmlightning.optim import Hyperball
from nmlightning.weights.channel_norms import ChannelLayout

RATE = 0.03


def attach(weight: Tensor, lr: float = RATE, **options: Any) -> tuple[torch.optim.SGD, Any]:
    optimizer = torch.optim.SGD([weight], lr, **options)
    return optimizer, Hyperball().attach(optimizer, [("weight", weight)])


def make_weight(*shape: int, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype))


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
