"""What a batch norm's constant makes of Gaussians."""

import pytest
import torch
from torch import Tensor, nn

from batch_norm_contract import EXACT, NORMS, Norm, each_kind, every_statistic


@pytest.fixture(scope="module", params=[(64, 20_000, 3e-2), (1_024, 8_000, 1e-2)], ids=str)
def gaussians(request: pytest.FixtureRequest) -> tuple[Tensor, float]:
    """N(3, 5²) of n values in many channels, and how far the output's std may be from 1.

    The maximum of n varies by 15 % … 6 %; over so many channels the mean is good to 0.2 %.
    """
    n, channels, tolerance = request.param
    generator = torch.Generator().manual_seed(n)
    return 5 * torch.randn(n // 16, channels, 16, generator=generator) + 3, tolerance


@pytest.fixture(scope="module", params=[(10_000, 1_000, 1e-2), (100_000, 200, 1e-2)], ids=str)
def many_gaussians(request: pytest.FixtureRequest) -> tuple[Tensor, float]:
    n, channels, tolerance = request.param
    generator = torch.Generator().manual_seed(n)
    return 5 * torch.randn(n // 100, channels, 100, generator=generator) + 3, tolerance


def mean_std(layer: nn.Module, x: Tensor) -> float:
    """Return the standard deviation of a channel's output, averaged over the channels."""
    with torch.no_grad():
        return layer(x).transpose(0, 1).flatten(1).std(1).mean().item()


@every_statistic
def test_gaussians_leave_with_unit_std(norm: Norm, gaussians: tuple[Tensor, float]) -> None:
    x, tolerance = gaussians
    layer = norm.layer(x.shape[1], dims=1, affine=False)
    assert mean_std(layer, x) == pytest.approx(1, abs=tolerance)


@each_kind
def test_many_gaussians_too(norm: Norm, many_gaussians: tuple[Tensor, float]) -> None:
    x, tolerance = many_gaussians
    layer = norm.layer(x.shape[1], dims=1, affine=False)
    assert mean_std(layer, x) == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize(
    ("norm", "n", "std"),
    [
        ("linf", 100, 0.72),
        ("linf", 100_000, 0.686),
        ("top10", 100, 0.963),
        ("top10", 10_000, 0.785),
    ],
)
def test_the_papers_constant_leaves_too_little(norm: str, n: int, std: float) -> None:
    """C(ideal)/C(paper), from the published table; 400 channels leave 0.3 … 0.8 % of noise."""
    x = torch.randn(n // 10, 400 if n < 100_000 else 100, 10)
    layer = NORMS[norm].layer(x.shape[1], dims=1, affine=False, constant="paper")
    assert mean_std(layer, x) == pytest.approx(std, rel=0.02)


@every_statistic
@pytest.mark.parametrize("constant", ["none", 0.25, 4])
def test_other_constants(norm: Norm, constant: str | float) -> None:
    x = torch.randn(8, 3, 2, 2, dtype=torch.float64)
    exact = norm.layer(eps=0.0, affine=False)
    other = norm.layer(eps=0.0, affine=False, constant=constant)
    factor = norm.constant(32) / (1 if constant == "none" else constant)  # type: ignore[operator]
    torch.testing.assert_close(other(x), exact(x) * factor, **EXACT)
