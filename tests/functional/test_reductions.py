"""Means in half: right where a running sum is not, and over dimensions in any order."""

import numpy as np
import pytest
import torch

from nmlightning.functional.reductions import (
    Share,
    half_mean,
    half_mean_of_inputs,
    mean_of,
    sum_of,
    sum_of_sizes,
)

HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("count", [1, 2, 3, 255, 257, 3136, 100_352])
def test_half_mean_keeps_halfs_precision(dtype: torch.dtype, size: float, count: int) -> None:
    values = (size * torch.randn(3, count)).clamp(-6e4, 6e4).abs().to(dtype)
    found = half_mean(values, (1,))
    assert found.dtype == dtype
    # 17 levels of halving, whose roundings cancel for the most part.
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(
        found.double(), values.double().mean(1), rtol=2 * rounding, atol=1.2e-7
    )


def test_half_mean_is_no_running_sum() -> None:
    values = torch.rand(100_000).half()
    # Torch's own sums of half accumulate in float32.
    running = np.cumsum(values.numpy(), dtype=np.float16)[-1].item() / 100_000
    assert running < 0.05 < 0.49 < half_mean(values, (0,)) < 0.51


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 2, 3), (-1, -2), (3, 0)])
def test_half_mean_takes_any_dimensions(dims: tuple[int, ...]) -> None:
    values = torch.randn(4, 3, 5, 2).half()
    expected = values.double().mean(dims)
    torch.testing.assert_close(half_mean(values, dims).double(), expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(
        mean_of(values, dims, Share(values.numel() // expected.numel())).double(),
        expected,
        rtol=0,
        atol=2e-3,
    )


def test_half_mean_of_inputs_far_from_zero_is_rounded_once() -> None:
    values = (torch.randn(16, 5000) + 1000).half()
    mean = half_mean_of_inputs(values, (1,))
    exact = values.double().mean(1)
    assert (mean.double() - exact).abs().max() <= 0.26  # half's spacing there is 0.5
    large = (1e4 * torch.randn(16, 5000)).clamp(-6e4, 6e4).half()
    found = half_mean_of_inputs(large, (1,)).double()
    torch.testing.assert_close(found, large.double().mean(1), rtol=0, atol=20)


def test_sums_of_half_are_float32() -> None:
    values = torch.full((300, 2), 1000.0)
    assert sum_of(values.half(), (0,)).tolist() == [300_000.0] * 2
    assert sum_of(values.half(), (0,)).dtype == torch.float32
    assert sum_of_sizes(-values.half(), (0,)).tolist() == [300_000.0] * 2
    for dtype in (torch.float32, torch.float64):
        assert sum_of(values.to(dtype), (0,)).dtype == dtype
        assert torch.equal(sum_of_sizes(-values.to(dtype), (0,)), sum_of(values.to(dtype), (0,)))


def test_half_mean_of_nothing_is_zero() -> None:
    assert half_mean(torch.ones(0, 3).half(), (0,)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dims", [(0,), (0, 2, 3), (0, 2), (-2, -1)])
def test_sum_of_sizes_is_no_running_sum(dims: tuple[int, ...]) -> None:
    values = torch.randn(
        [64, 3, 64, 64][: max(2, 1 + max(dims))] if dims[0] == 0 else [3, 512, 512]
    )
    expected = values.double().abs().sum(dims)
    found = sum_of_sizes(values, dims).double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # a running sum is 1e-5 off
