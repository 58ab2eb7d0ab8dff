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
        radii = make_weight(4, 3, 2, 2).detach().norm() / weight.grad.norm()
        torch.testing.assert_close(
            handle.factors()["weight"], radii.expand(6 if layouts else 4), rtol=1e-9, atol=0
        )
    torch.testing.assert_close(*results, rtol=1e-14, atol=1e-14)


class Experts(nn.Module):
    """A stack of experts, a convolution of as many dimensions, and an embedding of positions."""

    def __init__(self, name: str = "experts") -> None:
        super().__init__()
        self.register_parameter(name, make_weight(4, 6, 3))
        self.conv = nn.Conv1d(2, 3, 4).double()
        self.pos = nn.Parameter(make_weight(1, 2, 8).detach())


def take_steps(model: nn.Module, steps: int = 10, **options: Any) -> Any:
    """Step by gradients whose sizes differ from matrix to matrix."""
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    handle = Hyperball(**options).attach(optimizer, model)
    for step in range(steps):
        for q in model.parameters():
            sizes = 10.0 ** torch.arange(len(q), dtype=q.dtype)
            q.grad = make_weight(*q.shape).detach().roll(step).cos()
            q.grad *= sizes.view(-1, *[1] * (q.dim() - 1))
        optimizer.step()
    return handle


@pytest.mark.parametrize(
    ("name", "granularity"), [("experts", "auto"), ("mlp", "matrix"), ("experts", "weight")]
)
def test_each_matrix_of_a_stack_keeps_its_norm(name: str, granularity: str) -> None:
    """As if it were a parameter of its own; a weight of a layer is one weight."""
    model = Experts(name)
    stack = model.get_parameter(name)
    before = [q.detach().clone() for q in model.parameters()]
    handle = take_steps(model, granularity=granularity)
    assert handle.steered == [name, "pos", "conv.weight"]
    for q, first in zip(model.parameters(), before, strict=True):
        if q.dim() > 1:
            torch.testing.assert_close(q.detach().norm(), first.norm(), rtol=1e-14, atol=0)
    kept = torch.isclose(stack.detach().norm(dim=(1, 2)), before[0].norm(dim=(1, 2)), rtol=1e-14)
    assert kept.tolist() == [granularity != "weight"] * 4
    single = nn.Parameter(before[0][2].clone())
    optimizer, _ = attach(single, momentum=0.9)
    for step in range(10):
        single.grad = make_weight(4, 6, 3).detach().roll(step).cos()[2]
        optimizer.step()
    assert torch.allclose(single, stack[2], rtol=1e-12) == (granularity != "weight")


def test_one_expert_that_is_not_finite_skips_its_step_alone() -> None:
    model = Experts()
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    handle = Hyperball().attach(optimizer, model)
    before = model.experts.detach().clone()
    model.experts.grad = torch.ones_like(model.experts)
    model.experts.grad[1, 0, 0] = torch.nan
    optimizer.step()
    assert torch.equal(model.experts[1], before[1])
    assert [torch.equal(a, b) for a, b in zip(model.experts, before, strict=True)].count(True) == 1
    assert handle.skipped == 1


def test_what_may_be_a_stack_is_refused_with_the_choice() -> None:
    message = (
        r"mlp of shape \(4, 6, 3\) may be one weight or a stack of matrices: give "
        r'granularity="weight" or "matrix", or name it in exclude'
    )
    with pytest.raises(InputError, match=message):
        take_steps(Experts("mlp"))
    model = nn.Conv1d(2, 3, 4)
    with pytest.raises(InputError, match="weight of shape"):
        Hyperball().attach(torch.optim.SGD(model.parameters(), 0.1), model.named_parameters())
    assert take_steps(Experts("mlp"), exclude=["mlp"]).steered == ["pos", "conv.weight"]
    with pytest.raises(InputError, match="granularity is 'auto' or 'matrix' or 'weight', got 'x'"):
        Hyperball(granularity="x")  # type: ignore[arg-type]


def test_an_object_of_an_older_release_has_the_default() -> None:
    rule = Hyperball()
    del rule.granularity
    assert rule.granularity == "auto"


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
