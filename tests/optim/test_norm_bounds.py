"""SpectralCap and UnitNorm: how near the bound is, stacks, the dimension of each matrix.

Their numpy ports are in test_conditions.py.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nmlightning import Transformer
from nmlightning.errors import InputError
from nmlightning.optim import SpectralCap, StepRule, UnitNorm
from nmlightning.weights.channel_norms import ChannelLayout

NGPT = {"*.out.weight": 0, "*.outer.weight": 0, "*": 1}


def step_on(rule: StepRule, weight: Tensor, *gradients: Tensor, lr: float = 1.0) -> Any:
    optimizer = torch.optim.SGD([weight], lr)
    handle = rule.attach(optimizer, [("experts", weight)])
    for weight.grad in gradients:
        optimizer.step()
    return handle


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def largest(weight: Tensor) -> Tensor:
    return torch.linalg.svdvals(weight.detach())[..., 0]


@pytest.mark.parametrize("shape", [(64, 32), (32, 256), (200, 10), (4, 16, 24)])
@pytest.mark.parametrize("kind", ["random", "towards one direction"])
def test_largest_singular_value_is_near_the_bound(shape: tuple[int, ...], kind: str) -> None:
    """The 2 % of short steps, and some more for another machine; most are far nearer."""
    weight = nn.Parameter(draw(*shape) / math.sqrt(shape[-1]))
    optimizer = torch.optim.Adam([weight], lr=0.002)
    SpectralCap(1.0).attach(optimizer, [("experts", weight)])
    over = []
    for step in range(60):
        weight.grad = draw(*shape, seed=step + 1)
        if kind != "random":
            weight.grad -= 3 * draw(*shape[:-1], 1, seed=99) * draw(shape[-1], seed=98)
        optimizer.step()
        over.append(float(largest(weight).max()))
    assert max(over) < 1.03
    assert sorted(over)[len(over) // 2] == pytest.approx(1.0, abs=0.005)


@pytest.mark.parametrize(("longest", "rows"), [([0.0, -1.0], 2), ([-1.2, 0.0], 1)])
def test_direction_of_rows_that_cancel_is_found(longest: list[float], rows: int) -> None:
    """Also where the longest row of the step is not along it."""
    weight = nn.Parameter(torch.tensor([[0.5, 0]] * rows + [[0.0, 0]] * (5 - rows)))
    gradient = torch.tensor([longest, [0, 1], [0, -1], [0, 1], [0, -longest[1] - 1]])
    step_on(SpectralCap(1.0), weight, *[gradient] * 200, lr=0.1)
    assert float(largest(weight)) == pytest.approx(1.0, abs=1e-3)  # of the power iteration's end


def test_weight_below_the_bound_does_not_change() -> None:
    weight = nn.Parameter(torch.eye(3))
    step_on(SpectralCap(1.5), weight, torch.diag(torch.tensor([-0.4, 0.0, 0.3])))
    torch.testing.assert_close(weight.detach(), torch.diag(torch.tensor([1.4, 1.0, 0.7])))


def test_matrices_of_a_stack_are_capped_each() -> None:
    weight = nn.Parameter(draw(3, 4, 5) * torch.tensor([0.01, 1.0, 10.0])[:, None, None])
    before = weight.detach().clone()
    step_on(SpectralCap(1.0), weight, torch.zeros_like(weight))
    torch.testing.assert_close(weight[0].detach(), before[0])
    torch.testing.assert_close(largest(weight)[1:], torch.ones(2), rtol=1e-3, atol=0)
    weight = nn.Parameter(before.clone())
    step_on(SpectralCap(1.0, granularity="weight"), weight, torch.zeros_like(weight))
    torch.testing.assert_close(largest(weight.flatten(1)), torch.ones(()), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dim", [0, 1])
def test_vectors_of_a_stack_are_those_of_its_matrices(dim: int) -> None:
    weight = nn.Parameter(draw(3, 4, 5))
    step_on(UnitNorm(dim), weight, draw(3, 4, 5, seed=1))
    norms = weight.detach().norm(dim=1 + dim)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    model = nn.ParameterDict({"mlp": nn.Parameter(draw(3, 4, 5))})
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    with pytest.raises(InputError, match=r"mlp of shape .* may be one weight or a stack of matric"):
        UnitNorm(dim).attach(optimizer, model.named_parameters())


def test_weight_of_zeros_may_grow() -> None:
    weight = nn.Parameter(torch.zeros(3, 2))
    step_on(SpectralCap(1.0), weight, -torch.ones(3, 2))
    torch.testing.assert_close(weight.detach(), torch.full((3, 2), 1 / math.sqrt(6)))
    weight = nn.Parameter(torch.zeros(3, 2))
    step_on(UnitNorm(), weight, torch.tensor([[-3.0, -4.0], [0.0, 0.0], [0.0, 1.0]]))
    expected = torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, -1.0]])
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("rule", [SpectralCap(1.0), UnitNorm(), UnitNorm(0)])
def test_channels_of_a_transposed_convolution(rule: StepRule) -> None:
    """A weight (in, out, …) is as its rows (out, in, …) are, to which the rule does the same."""
    layout = ChannelLayout(1)
    weights = [nn.Parameter(draw(4, 3, 2, 2)), nn.Parameter(draw(4, 3, 2, 2).transpose(0, 1))]
    for weight, layouts in zip(weights, ({"w": layout}, {}), strict=True):
        optimizer = torch.optim.SGD([weight], 1.0)
        rule.attach(optimizer, [("w", weight)], layouts)
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    rows = layout.rows(weights[0].detach())
    torch.testing.assert_close(rows, weights[1].detach(), rtol=1e-3, atol=1e-4)


def test_ngpt_on_the_transformer() -> None:
    """Vectors of the width are on the sphere: embeddings, and what reads from or writes into it."""
    torch.manual_seed(0)
    model = Transformer(30, width=16, hidden=24, heads=2, encoder_layers=1, decoder_layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    handle = UnitNorm(dim=NGPT).attach(optimizer, model)
    for q in model.parameters():
        q.grad = draw(*q.shape)
    optimizer.step()
    assert {model.get_parameter(name).dim() for name in handle.steered} == {2}
    for name in handle.steered:
        weight = model.get_parameter(name).detach()
        writes = name.split(".")[-2] in ("out", "outer")
        assert weight.shape[0 if writes else 1] == 16, "the dimension that is normalised"
        norms = weight.norm(dim=0 if writes else 1)
        torch.testing.assert_close(norms, torch.ones_like(norms))


def test_edm2_has_elements_of_unit_magnitude() -> None:
    weight = nn.Parameter(draw(4, 3, 3, 3))
    step_on(UnitNorm(norm="rms"), weight, draw(4, 3, 3, 3, seed=1))
    means = weight.detach().square().mean((1, 2, 3))
    torch.testing.assert_close(means, torch.ones(4))
