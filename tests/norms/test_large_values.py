"""Test that values far above those whose squares float32 holds are normalised like others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nmlightning import norms
from nmlightning.errors import InputError
from nmlightning.kernels.dispatch import norm_backend

NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch l1": (lambda: norms.L1BatchNorm2d(8), (8, 8, 8, 8)),
    "batch linf": (lambda: norms.LInfBatchNorm2d(8), (8, 8, 8, 8)),
    "batch topk": (lambda: norms.TopKBatchNorm2d(8), (8, 8, 8, 8)),
    "batch range": (lambda: norms.RangeBatchNorm2d(8), (8, 8, 8, 8)),
    "batch p2": (lambda: norms.LpBatchNorm2d(8, p=2.0), (8, 8, 8, 8)),
    "batch p3": (lambda: norms.LpBatchNorm2d(8, p=3.0), (8, 8, 8, 8)),
    "layer l1": (lambda: norms.L1LayerNorm(64), (8, 64)),
    "layer p2": (lambda: norms.LpLayerNorm(64, 2.0), (8, 64)),
    "rms l1": (lambda: norms.L1RMSNorm(64), (8, 64)),
    "rms p2": (lambda: norms.LpRMSNorm(64, 2.0), (8, 64)),
}


@pytest.mark.parametrize("backend", ["auto", "formula"])
@pytest.mark.parametrize("largest", [1e18, 1e20, 1e37])
@pytest.mark.parametrize("name", NORMS)
def test_outputs_and_gradients_are_those_of_float64(
    name: str, largest: float, backend: Any
) -> None:
    make, shape = NORMS[name]
    x = torch.randn(shape)
    x, g = (x * (largest / x.abs().max())).requires_grad_(), torch.randn(shape)
    wide = x.detach().double().requires_grad_()
    layer = make()
    with norm_backend(backend):
        y = layer(x)
    expected = make().double()(wide)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    found = torch.autograd.grad(y, [x, *layer.parameters()], g)
    (by_x,) = torch.autograd.grad(expected, wide, g.double())
    torch.testing.assert_close(found[0].double() * largest, by_x * largest, rtol=1e-3, atol=1e-3)
    assert all(q.isfinite().all() for q in found)


def test_no_channels_are_an_error() -> None:
    for make in (norms.L1BatchNorm2d, norms.LInfBatchNorm1d, norms.MeanOnlyBatchNorm2d):
        with pytest.raises(InputError, match="num_features must be a whole number of at least 1"):
            make(0)
