"""Which backend computes a layer, why, and that all of them compute the same."""

from typing import Any

import pytest
import torch
from torch import nn

from nmlightning.int8 import Int8Conv2d, Int8Linear, backends, describe_backends
from nmlightning.int8.backends import INT_MM, MAX_DEPTH, ONEDNN, Convolution, MatrixProduct
from nmlightning.int8.quantizer import Grid
from nmlightning.kernels import norm_backend


@pytest.fixture(autouse=True)
def _auto() -> Any:
    with norm_backend("auto"):
        yield


def skip_without(name: str) -> None:
    if reason := backends.cpu_reason(name):
        assert not torch.cpu._is_vnni_supported(), reason  # such a CPU adds in int32
        pytest.skip(reason)


@pytest.mark.parametrize(("dims", "name"), [(0, INT_MM), (1, ONEDNN), (2, ONEDNN), (3, ONEDNN)])
@pytest.mark.parametrize("zero_point", [0, 77, 255])
def test_the_largest_sums_of_torchs_undocumented_operators_are_exact(
    dims: int, name: str, zero_point: int
) -> None:
    skip_without(name)
    each, depth = (1,) * dims, MAX_DEPTH // 8 * 8
    operation = Convolution(each, (0,) * dims, each, 1) if dims else MatrixProduct()
    q = torch.full((2, depth, *each), 255, dtype=torch.uint8)
    weight = torch.full((8, depth, *each), -128, dtype=torch.int8)
    grid = Grid(torch.tensor(1.0), torch.tensor(float(zero_point)), 8)
    backend = backends.Dispatch("", "", backends._by_onednn if dims else backends._by_int_mm)
    y = backends.multiply(backend, operation, q, grid, weight, torch.ones(1), None)
    expected = torch.tensor(float(-128 * depth * (255 - zero_point)))
    torch.testing.assert_close(y, expected.expand(2, 8, *each), rtol=1e-7, atol=0)


@pytest.mark.parametrize("spatial", [(), (3,), (3, 5)])
def test_int_mm_computes_pointwise_convolutions_as_on_cuda(spatial: tuple[int, ...]) -> None:
    skip_without(INT_MM)
    each = (1,) * len(spatial)
    operation = Convolution(each, (0,) * len(each), each, 1) if spatial else MatrixProduct()
    q = torch.randint(0, 256, (17, 24, *spatial), dtype=torch.uint8)
    weight = torch.randint(-128, 128, (16, 24, *each), dtype=torch.int8)
    grid = Grid(torch.tensor(0.1), torch.tensor(99.0), 8)
    tensors = (q, grid, weight, torch.rand(16), torch.randn(16))
    found = backends._by_int_mm(operation, *tensors)
    torch.testing.assert_close(found, backends._by_formula(operation, *tensors), rtol=0, atol=0)


def test_the_table_tells_both_ways() -> None:
    for name in (ONEDNN, INT_MM):
        skip_without(name)
    net = nn.Sequential(
        Int8Conv2d(8, 8, 3, padding=1), Int8Conv2d(8, 8, 3, stride=3), nn.ReLU(), Int8Linear(8, 4)
    )
    table = {name: [each.backend for each in both] for name, both in describe_backends(net).items()}
    assert table == {"0": [ONEDNN] * 2, "1": [ONEDNN, "formula"], "3": [INT_MM] * 2}
    assert "strides that multiply to over 4" in describe_backends(net)["1"][1].reason
    with norm_backend("formula"):
        assert describe_backends(net)["0"][0].reason == "asked for"


@pytest.mark.parametrize(
    ("layer", "x", "reason"),
    [
        (Int8Linear(MAX_DEPTH + 1, 2), torch.ones(2, MAX_DEPTH + 1), "int32 cannot hold"),
        (Int8Linear(3, 2), torch.ones(0, 3), "no values"),
        (Int8Linear(3, 2).double(), torch.ones(2, 3).double(), "no integer sums for float64"),
        (Int8Linear(3, 2, device="meta"), torch.ones(2, 3, device="meta"), "sums for meta"),
    ],
)
def test_the_formula_has_a_reason(layer: Any, x: torch.Tensor, reason: str) -> None:
    chosen = layer.backend_for(x)
    assert chosen.backend == "formula"
    assert reason in chosen.reason
    assert layer(x).shape == (len(x), 2)


def test_an_absent_operator_means_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "onednn", object())
    monkeypatch.delattr(torch, "_int_mm")
    backends.cpu_reason.cache_clear()
    try:
        for layer, x in (
            (Int8Conv2d(3, 4, 3), torch.randn(2, 3, 5, 5)),
            (Int8Linear(3, 4), torch.randn(2, 3)),
        ):
            chosen = layer.backend_for(x)
            assert chosen.backend == "formula"
            assert chosen.reason.startswith("this torch has no such operator: ")
            assert layer(x).isfinite().all()
    finally:
        backends.cpu_reason.cache_clear()


def test_operators_are_tried_on_the_cpu_whatever_the_default_device() -> None:
    reasons = []
    for device in ("cpu", "meta"):
        backends.cpu_reason.cache_clear()
        with torch.device(device):
            reasons.append([backends.cpu_reason(name) for name in (ONEDNN, INT_MM)])
    backends.cpu_reason.cache_clear()
    assert reasons[0] == reasons[1]


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (Int8Conv2d(8, 8, 3), (32, 8, 5, 5), "1×1 convolutions and matrix products only"),
        (Int8Conv2d(8, 8, 1), (1, 8, 2, 2), "over 16 rows and multiples of 8 on CUDA, got 4 by 8"),
        (Int8Linear(9, 8), (32, 9), "got 32 by 9 by 8"),
        (Int8Conv2d(8, 8, 1), (32, 8, 5, 5), ""),
        (Int8Linear(8, 16), (32, 8), ""),
    ],
)
def test_cuda_has_what_int_mm_takes(layer: Any, shape: tuple[int, ...], reason: str) -> None:
    found = backends._cuda_reason(layer._operation(), torch.empty(shape), layer.weight)
    assert reason in found if reason else found == ""
