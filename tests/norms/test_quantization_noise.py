"""Additive noise: its size is that of the input, its gradient nobody's."""

import math

import pytest
import torch

from nmlightning.errors import InputError
from nmlightning.norms import QuantizationNoise


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_noise_is_added_in_proportion_to_the_deviation(
    dtype: torch.dtype, scale: float
) -> None:
    x = (scale * (torch.randn(64, 8, 16, 16) + 5)).to(dtype)
    y = QuantizationNoise(0.3).eval()(x)
    noise = y.double() - x.double()
    assert y.dtype == dtype
    # 131,072 values: σ to 0.2 %; bfloat16 rounds values of 5 σ to 1 % of σ.
    assert noise.std() == pytest.approx(0.3 * scale, rel=0.01)
    assert noise.mean().abs() < 0.01 * scale
    correlation = torch.corrcoef(torch.stack([noise.flatten(), x.double().flatten()]))[0, 1]
    assert correlation.abs() < 0.02  # a factor instead of a summand would correlate |noise| with x
    sizes = torch.corrcoef(torch.stack([noise.abs().flatten(), x.double().flatten()]))[0, 1]
    assert sizes.abs() < 0.02


def test_a_uniform_quantiser_makes_as_much() -> None:
    """r = a / (√3 · 2^b) is the error of rounding to 2^b levels over ±a σ."""
    x = torch.randn(100_000, dtype=torch.float64)
    step = 2 * 4 / 2**6
    error = (x.clamp(-4, 4) / step).round() * step - x.clamp(-4, 4)
    assert error.std() == pytest.approx(4 / (math.sqrt(3) * 2**6), rel=0.02)


def test_gradients_pass_as_they_are() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    grad = torch.randn(4, 3)
    QuantizationNoise(0.5)(x).backward(grad)
    assert torch.equal(x.grad, grad)


def test_zero_and_fresh_noise() -> None:
    x = torch.randn(4, 3)
    noise = QuantizationNoise(0.5)
    assert QuantizationNoise(0)(x) is x
    assert not torch.equal(noise(x), noise(x))
    assert torch.equal(noise(torch.ones(4)), torch.ones(4))
    assert noise(torch.ones(1)).item() == 1
    assert repr(noise) == "QuantizationNoise(0.5)"


@pytest.mark.parametrize("ratio", [-0.1, math.nan, math.inf, "0.1", None, True])
def test_bad_ratios(ratio: object) -> None:
    with pytest.raises(InputError, match=f"ratio must be finite and at least 0, got {ratio!r}"):
        QuantizationNoise(ratio)  # type: ignore[arg-type]
