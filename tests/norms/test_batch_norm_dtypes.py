"""Batch norms at zero, overflow and NaN, and in every dtype."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batch_norm_contract import (
    Norm,
    check_half,
    define,
    every_norm,
    every_statistic,
    gradients,
    learned,
)
from nmlightning import norms
from nmlightning.errors import InputError
from nmlightning.surgery.swap import swap_norms


@every_norm
@pytest.mark.parametrize("value", [0.0, 3.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_constant_channel_gives_the_bias(norm: Norm, value: float, dtype: torch.dtype) -> None:
    x = torch.randn(4, 3, 2, 5).to(dtype)
    x[:, 1] = value
    leaf = x.requires_grad_()
    layer = norm.layer()
    y = layer(leaf)
    found = gradients(y, [leaf, *learned(layer)])
    assert y.isfinite().all()
    assert all(grad.isfinite().all() for grad in found)
    torch.testing.assert_close(y[:, 1], layer.bias[1].to(dtype).expand(4, 2, 5), rtol=0, atol=1e-2)
    assert layer.running_var[1].item() == pytest.approx(0.9 if norm.has_statistic else 1 - 1e-5)


every_bad_value = pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])


def poison(x: Tensor, bad: float) -> Tensor:
    """Return `x` with one bad value, in channel 1."""
    poisoned = x.clone()
    poisoned[2, 1, 0, 3] = bad
    return poisoned


@every_norm
@every_bad_value
def test_non_finite_channels_leave_running_statistics_alone(norm: Norm, bad: float) -> None:
    layer, clean = norm.layer(), norm.layer()
    first, second = torch.randn(2, 4, 3, 2, 5)
    layer(first), clean(first)
    before = copy.deepcopy(layer.state_dict())
    layer(poison(second, bad)), clean(second)
    for name in ("running_mean", "running_var"):
        after, expected = getattr(layer, name), getattr(clean, name)
        assert after[1] == before[name][1]
        # Beside a sum that is not finite all is computed in float64.
        torch.testing.assert_close(after[[0, 2]], expected[[0, 2]], rtol=1e-6, atol=0)


@every_norm
@every_bad_value
def test_momentum_none_averages_finite_batches_only(norm: Norm, bad: float) -> None:
    layer, clean = norm.layer(momentum=None), norm.layer(momentum=None)
    first, second, third = torch.randn(3, 4, 3, 2, 5)
    for x in (poison(first, bad), first, poison(second, bad), third):
        layer(x)
    clean(first), clean(third)
    torch.testing.assert_close(
        layer.state_dict(), {**clean.state_dict(), **dict(layer.named_parameters())}
    )


@every_statistic
def test_overflowing_variance_leaves_running_statistics_alone(norm: Norm) -> None:
    layer = norm.layer()
    layer(1e30 * torch.randn(4, 3, 2, 5))
    assert torch.equal(layer.running_var, torch.ones(3))


@every_norm
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_accumulate_in_float32(norm: Norm, dtype: torch.dtype) -> None:
    """Equal to the float64 formula on the same values up to one rounding of what is returned.

    32,768 values around 10 would overflow fp16's sum five times, and bf16's would stop at 2,560.
    """
    x, layer = (torch.randn(32, 3, 32, 32) + 10).to(dtype), norm.layer()
    weight, bias = layer.weight.double(), layer.bias.double()
    check_half(layer, lambda high: define(norm, high, weight, bias)[0], x)
    torch.testing.assert_close(layer.running_mean.double(), 0.1 * x.double().mean((0, 2, 3)))


@every_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_output_keeps_dtype_and_memory_format(norm: Norm, dtype: torch.dtype) -> None:
    x = torch.randn(4, 3, 2, 5).to(dtype)
    for arranged in (x, x.contiguous(memory_format=torch.channels_last)):
        leaf = arranged.requires_grad_()
        y = norm.layer()(leaf)
        (grad,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        assert (y.dtype, y.stride()) == (leaf.dtype, leaf.stride())
        assert (grad.dtype, grad.stride()) == (leaf.dtype, leaf.stride())


@every_norm
@pytest.mark.parametrize("stats_dtype", ["float64", torch.float64])
def test_stats_dtype_float64_is_precise_far_from_zero(norm: Norm, stats_dtype: Any) -> None:
    x = torch.randn(8, 3, 4, 4) + 1000
    layer = norm.layer(stats_dtype=stats_dtype)
    exact = define(norm, x.double(), layer.weight.double(), layer.bias.double())[0]
    # One rounding to float32; in float32 throughout, x − μ alone would cost 1000 · 2⁻²⁴ = 6e-5.
    torch.testing.assert_close(layer(x), exact.float(), rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_input_without_real_numbers_is_an_error(dtype: torch.dtype) -> None:
    for layer in (norms.L1BatchNorm2d(3), norms.MeanOnlyBatchNorm2d(3), norms.HalfL2BatchNorm2d(3)):
        with pytest.raises(InputError, match=f"real floating-point numbers, got {dtype}"):
            layer(torch.ones(4, 3, 2, 2).to(dtype))


def test_half_running_statistics_do_not_overflow() -> None:
    """A batch norm that was half before it was swapped, and of which nothing was cast since."""
    layer = nn.BatchNorm2d(1).half()
    swap_norms(nn.Sequential(layer), "l1")
    layer.running_var = layer.running_var.half()
    layer(torch.randn(8, 1, 8, 8).half() * 4000)
    assert layer.running_var.item() == 1.0  # 0.1 · 4000² is beyond 65504


@every_norm
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_running_statistics_stay_float32_in_a_half_model(norm: Norm, dtype: torch.dtype) -> None:
    layer, wide = norm.layer(), norm.layer()
    layer.load_state_dict(wide.state_dict())
    layer.to(dtype)
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    assert layer.bias.dtype == dtype
    x = (3 * torch.randn(8, 3, 8, 8) + 1).to(dtype)
    layer(x), wide(x.float())
    assert torch.equal(layer.running_mean, wide.running_mean)
    assert torch.equal(layer.running_var, wide.running_var)
    y = layer.eval()(x)
    rounding = torch.finfo(dtype).eps  # of weight, bias and output
    torch.testing.assert_close(y.float(), wide.eval()(x.float()), rtol=2 * rounding, atol=rounding)
    assert y.dtype == dtype


def test_half_model_can_be_swapped_back() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).half()
    x = torch.randn(8, 3, 6, 6).half()
    swap_norms(net, "l1")
    net(x)
    running = net[1].running_var.half()
    swap_norms(net, "l2")
    assert torch.equal(net[1].running_var, running)
    assert net(x).isfinite().all()
    assert net.eval()(x).isfinite().all()


@every_norm
def test_running_statistics_are_float32_in_half_layers_and_after_assignment(norm: Norm) -> None:
    half, layer = norm.layer(dtype=torch.float16), norm.layer()
    layer.load_state_dict(nn.BatchNorm2d(3).half().state_dict(), assign=True)
    for each in (half, layer):
        assert each.running_mean.dtype == each.running_var.dtype == torch.float32
    doubled = norm.layer().double()
    assert doubled.running_var.dtype == torch.float64
    assert norm.layer(track_running_stats=False).half().running_var is None
