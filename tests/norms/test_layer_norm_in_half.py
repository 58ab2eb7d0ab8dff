"""Layer and RMS norms in half: where squares leave float16's range, and L1 and scaled do not.

The rows are those of the table in docs/half_precision.md: right is a token whose root mean squared
error is below 5 % of the float64 formula with the same eps. That is 1e-10, so that small σ test
half's range and not eps. Torch's own norms compute in float32, whatever their input, and are right
everywhere; what fails is the textbook's formula with every value in float16, written down below.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nmlightning import norms

TOKENS = 256
EPS = 1e-10
SIGMAS = [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 60.0, 100.0, 1e3, 1e4]
MIDDLE = {0.1, 1.0, 10.0}
HALF = {"stats_dtype": torch.float16}
KINDS = ["LayerNorm", "RMSNorm"]
Norm = Callable[[Tensor], Tensor]

every_width = pytest.mark.parametrize("width", [256, 512, 4096])
every_kind = pytest.mark.parametrize("kind", KINDS)


def op_by_op(x: Tensor, kind: str) -> Tensor:
    """Return L2 as the textbook has it, each result in float16, its means summed in float32."""
    half = x.half()
    deviations = half - half.mean(-1, keepdim=True) if kind == "LayerNorm" else half
    variance = deviations.square().mean(-1, keepdim=True)
    return deviations * (variance + EPS).pow(-0.5)


def make(name: str, width: int, **settings: Any) -> nn.Module:
    home = nn if name in KINDS else norms
    layer: nn.Module = getattr(home, name)(width, eps=EPS, elementwise_affine=False, **settings)
    return layer


def tokens(width: int, sigma: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = sigma * torch.randn(TOKENS, width, generator=generator)
    return x.half(), torch.randn(TOKENS, width, generator=generator)


def run(norm: Norm, x: Tensor, grad: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = norm(leaf)
    return [y.detach().double(), *torch.autograd.grad(y, leaf, grad.to(y.dtype))]


def shares_wrong(norm: Norm, exact: Norm, width: int, sigma: float) -> list[float]:
    """Return the share of tokens that are wrong or not finite, forward and backward."""
    x, grad = tokens(width, sigma)
    shares = []
    for found, right in zip(run(norm, x, grad), run(exact, x.double(), grad), strict=True):
        error = (found.double() - right).square().mean(-1).sqrt()
        is_right = error <= 0.05 * right.square().mean(-1).sqrt()
        shares.append(1 - is_right.double().mean().item())
    return shares


@every_kind
@every_width
@pytest.mark.parametrize("sigma", SIGMAS)
def test_l1_and_scaled_are_right_at_every_scale_and_l2_is_not(
    kind: str, width: int, sigma: float
) -> None:
    l1 = make(f"L1{kind}", width, stats_dtype=torch.float64)
    l2 = make(f"Lp{kind}", width, p=2, stats_dtype=torch.float64)
    assert shares_wrong(make(f"L1{kind}", width, **HALF), l1, width, sigma) == [0, 0]
    assert shares_wrong(make(kind, width), l2, width, sigma) == [0, 0]  # torch's, in float32
    forward, backward = shares_wrong(make(f"Scaled{kind}", width), l2, width, sigma)
    assert forward == 0
    assert backward == 0 or sigma == 1e-4  # its halves double gradients, there above 32,752
    forward, backward = shares_wrong(lambda x: op_by_op(x, kind), l2, width, sigma)
    if sigma in MIDDLE:
        assert (forward, backward) == (0, 0)
    elif sigma < 0.1:  # the inverse root to the third power is above 65504
        assert backward == 1
        assert forward == (1 if sigma == 1e-4 else 0)
    elif sigma == 60:  # squares are above 65504 in some tokens
        assert 0 < forward == backward < 0.2
    else:
        assert min(forward, backward) > 0.9


@pytest.mark.parametrize("sigma", [1e-4, 1e-2, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("name", ["L1LayerNorm", "LpLayerNorm", "L1RMSNorm", "LpRMSNorm"])
def test_pure_half_with_parameters_is_within_1_percent(name: str, sigma: float) -> None:
    x, grad = tokens(512, sigma)
    found = []
    for dtype in (torch.float16, torch.float64):
        leaf = x.detach().to(dtype, copy=True).requires_grad_()
        layer = getattr(norms, name)(512, eps=EPS, stats_dtype=dtype)
        nn.init.constant_(layer.weight, 0.5)
        y = layer.to(dtype)(leaf)
        found.append([y, *torch.autograd.grad(y, [leaf, *layer.parameters()], grad.to(dtype))])
    for half, exact in zip(*found, strict=True):
        error = (half - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert error < 0.01


TOKENS_OF = {
    "mean 10 σ": lambda x, sigma: x + 10 * sigma,
    "outlier first": lambda x, sigma: torch.cat([x[:, :1] + 25 * sigma, x[:, 1:]], 1),
    "a spread of 100": lambda x, sigma: x * torch.logspace(-1, 1, x.shape[1]),
    "both ends": lambda x, _: torch.cat([0 * x[:, :1] + 5.9e4, x[:, 1:] - 5.9e4], 1),
    "constant": lambda x, sigma: torch.full_like(x, 3 * sigma),
    "zero": lambda x, sigma: torch.zeros_like(x),
}


@every_kind
@pytest.mark.parametrize("eps", [1e-5, 1e-12])
@pytest.mark.parametrize("sigma", [1e-4, 1e-2, 1.0, 60.0, 1e3])
def test_scaled_is_right_for_every_token_that_float16_holds(
    kind: str, eps: float, sigma: float
) -> None:
    """In float16 to 0.2 % of the largest output, and in float32 to 2 units in its last place, or 4
    beside an outlier, where sums round more."""
    for name, change in TOKENS_OF.items():
        x = change(tokens(768, sigma)[0].float(), sigma)
        units = 4 if name in ("outlier first", "both ends") else 2
        for dtype, close in ((torch.float16, 2e-3), (torch.float32, units * 2**-23)):
            given = x.to(dtype)
            d = given.double()
            d = d - d.mean(-1, keepdim=True) if kind == "LayerNorm" else d
            right = d / (d.square().mean(-1, keepdim=True) + eps).sqrt()
            found = getattr(norms, f"Scaled{kind}")(768, eps).to(dtype)(given)
            assert found.dtype == dtype
            errors = (found - right).abs().amax(-1) / right.abs().amax(-1).clamp_min(1e-3)
            assert errors.max() <= close


@every_kind
@pytest.mark.parametrize("stats_dtype", [None, torch.float16])
@pytest.mark.parametrize("sigma", [1e-4, 1.0, 1e4])
def test_autocast_normalises_as_float64_does(
    kind: str, stats_dtype: torch.dtype | None, sigma: float
) -> None:
    """The half output of a linear layer is normalised as in float64, and returned in half."""
    linear, layer = nn.Linear(64, 256, bias=False), getattr(norms, f"L1{kind}")(256, eps=EPS)
    layer.stats_dtype = stats_dtype
    nn.init.normal_(linear.weight, std=sigma / 8)
    x = torch.randn(TOKENS, 64)
    with torch.autocast("cpu", torch.float16):
        entered = linear(x)
        y = layer(entered)
    exact = make(f"L1{kind}", 256)(entered.double())
    assert entered.dtype == y.dtype == torch.float16
    torch.testing.assert_close(y.double(), exact, rtol=0.01, atol=0.01)
    # So small a gradient that at 1e-4, where it grows by 1e4, the sums over tokens stay in float16.
    y.backward(0.01 * torch.randn(y.shape).half())
    gradients = [linear.weight.grad, *(q.grad for q in layer.parameters())]
    assert all(g is not None and g.isfinite().all() for g in gradients)
