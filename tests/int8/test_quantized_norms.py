"""Norms with a quantised input and output gradient: each norm of the same quantised tensors."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import nmlightning
from nmlightning.errors import InputError
from nmlightning.int8 import Int8Linear, quantize_norm, restore_norm
from nmlightning.int8.quantizer import dequantize, extreme, make_grid, quantize, sample_mean

NORMS: list[Any] = [
    lambda: nmlightning.RangeBatchNorm2d(4, constant="official"),
    lambda: nmlightning.L1BatchNorm2d(4),
    lambda: nn.BatchNorm2d(4),
    lambda: nmlightning.L1LayerNorm(6),
    lambda: nn.LayerNorm(6),
]


@pytest.mark.parametrize("make", NORMS)
def test_a_quantised_norm_is_the_norm_of_quantised_tensors(make: Any) -> None:
    norm, x = make(), torch.randn(8, 4, 6, 6).requires_grad_()
    plain = copy.deepcopy(norm)
    quantize_norm(norm, bits=8, gradient_bits=3, rounding="nearest")
    grad = torch.randn_like(x)
    norm(x).mul_(1).backward(grad)  # in place, as the ReLU of a ResNet
    grid, gradients = make_grid(*sample_mean(x.detach()), 8), make_grid(*extreme(grad), 3)
    exact = dequantize(quantize(x.detach(), grid), grid).requires_grad_()
    plain(exact).backward(dequantize(quantize(grad, gradients), gradients))
    assert torch.equal(x.grad, exact.grad)
    for own, other in zip(norm.parameters(), plain.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)
    norm.eval(), plain.eval()
    assert torch.equal(norm(x), plain(exact))  # the first batch counts whole
    assert torch.equal(norm(x[:1]), norm(x)[:1])
    assert torch.equal(norm(input=x), norm(x))


def test_a_norm_is_restored_and_copied() -> None:
    norm = nmlightning.L1BatchNorm2d(4)
    before = norm.state_dict().keys()
    for _ in range(2):
        quantize_norm(norm, gradient_bits=4)
        assert repr(norm).endswith(
            "constant='exact', quantised(bits=8, gradient_bits=4, rounding='stochastic', "
            "momentum=0.1, sync=False))"
        )
        assert norm.state_dict().keys() - before == {
            "running_min", "running_max", "num_ranges_tracked",
        }  # fmt: skip
    for copied in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), norm):
        x = torch.randn(8, 4, 6, 6)
        copied(x)
        assert copied.num_ranges_tracked == 1
        restore_norm(copied)
        assert "quantised" not in repr(copied)
        assert copied.state_dict().keys() == before
        torch.testing.assert_close(copied(x), nmlightning.L1BatchNorm2d(4)(x))
    with pytest.raises(InputError, match="L1BatchNorm2d is not quantised"):
        restore_norm(norm)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda norm: quantize_norm(norm, gradient_bits=1), "gradient_bits is a whole number of 2"),
        (lambda norm: quantize_norm(None), "norm is a torch.nn.Module .* got None"),
        (lambda norm: quantize_norm(Int8Linear(2, 2)), "that is not in int8 itself, got Int8Lin"),
        (lambda norm: norm(), "A quantised L1BatchNorm2d takes floating inputs, got None"),
        (lambda norm: norm(torch.ones(2, 4, 3, 3).int()), "takes floating inputs, got torch.int32"),
    ],
)
def test_bad_input_is_refused(call: Any, message: str) -> None:
    norm = nmlightning.L1BatchNorm2d(4)
    quantize_norm(norm)
    with pytest.raises(InputError, match=message):
        call(norm)
    assert not norm.num_ranges_tracked
