"""TReLU's constants by quadrature, and what becomes of a signal in the networks that have it."""

import copy
import math

import pytest
import torch
from scipy import integrate
from torch import nn

from nmlightning import TReLU, swap_norms
from nmlightning.models.vgg import VGG


def expect(power: int) -> float:
    """Return E TReLU(z)^power of a standard normal z, in float64."""

    def integrand(z: float) -> float:
        y = TReLU()(torch.tensor(z, dtype=torch.float64)).item()
        return float(y**power * math.exp(-z * z / 2) / math.sqrt(2 * math.pi))

    # Apart at the corner, where the rule's polynomials do not fit; beyond 12 is less than 1e-32.
    halves = (integrate.quad(integrand, *ends, epsabs=1e-13) for ends in ((-12, 0), (0, 12)))
    return sum(value for value, _ in halves)


def test_trelu_standardises_a_standard_normal() -> None:
    assert expect(1) == pytest.approx(0, abs=1e-12)
    assert expect(2) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_trelu_equals_the_formula(dtype: torch.dtype) -> None:
    z = torch.linspace(-3, 3, 61).view(1, 61, 1).to(dtype)
    before = z.clone()
    y = TReLU()(z)
    wide = (z.double().clamp(min=0) - 1 / math.sqrt(2 * math.pi)) / math.sqrt(0.5 - 0.5 / math.pi)
    assert (y.dtype, y.shape) == (dtype, z.shape)
    # Two roundings of numbers up to 5.
    torch.testing.assert_close(y.double(), wide, rtol=0, atol=10 * torch.finfo(dtype).eps)
    assert torch.equal(z, before)


def test_trelu_gradient() -> None:
    z = torch.tensor([-2.0, -0.0, 0.0, 1e-3, 2.0], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(TReLU()(z).sum(), z)
    slope = 1 / math.sqrt(0.5 - 0.5 / math.pi)
    torch.testing.assert_close(grad, torch.tensor([0, 0, 0, slope, slope], dtype=torch.float64))


def test_trelu_compiles_whole() -> None:
    z = torch.randn(4, 3, requires_grad=True)
    compiled = torch.compile(TReLU(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z), TReLU()(z))
    assert repr(copy.deepcopy(TReLU())) == "TReLU()"


def sizes(net: VGG) -> list[float]:
    """Return the standard deviation of each convolution's output, without the pooling."""
    found: list[float] = []
    signal = torch.randn(4, 3, 12, 12)
    with torch.no_grad():
        for layer in net.features:
            signal = signal if isinstance(layer, nn.MaxPool2d) else layer(signal)
            if isinstance(layer, nn.Conv2d):
                found.append(signal.std().item())
    return found


def test_trelu_keeps_the_scale_in_mean_only_networks() -> None:
    """As the initialisation has it for this activation; with ReLU it sinks from layer to layer."""
    net, other = VGG(19, width=32, activation="trelu"), VGG(19, width=32)
    for each in (net, other):
        swap_norms(each, "mean")
    found = sizes(net)
    # Where the channels double, the variance halves; zeros at the borders take their share.
    assert len(found) == 16
    assert all(0.25 < size < 0.8 for size in found)
    assert sizes(other)[-1] < 0.05
