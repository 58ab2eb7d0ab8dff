"""Triton's kernels on a GPU: the same contract, larger inputs, the same bits twice, CUDA graphs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)
pytest.importorskip("triton")

import kernel_contract as contract
from nmlightning import norms
from nmlightning.kernels import norm_backend
from nmlightning.kernels.interface import NormSpec
from nmlightning.kernels.triton import tiles
from nmlightning.kernels.triton.batch_norm import TritonBatchNorm, track
from nmlightning.kernels.triton.layer_norm import TritonLayerNorm

CUDA = "cuda"
KERNELS = TritonBatchNorm()
LAYERS = [norms.L1BatchNorm2d, norms.LInfBatchNorm2d, norms.TopKBatchNorm2d]
LARGE = [
    contract.Case(shape, statistic, fused, dtype, channels_last)
    for shape in [(32, 64, 56, 56), (64, 24, 14, 14), (128, 256, 7, 7), (8, 2048, 7, 7)]
    for statistic in contract.STATISTICS
    for fused, dtype in (("relu", torch.bfloat16), (None, torch.float32))
    for channels_last in (False, True)
]
each_layer = pytest.mark.parametrize("layer", LAYERS)


@pytest.mark.parametrize(
    "case", [*contract.CASES, *contract.WIDTHS, *contract.FLOAT16, *LARGE], ids=str
)
def test_kernels_equal_the_definition(case: contract.Case) -> None:
    contract.check(case, KERNELS, CUDA)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("statistic", contract.STATISTICS)
def test_non_finite_values_stay_in_their_channel(statistic: str, value: float) -> None:
    contract.check_nonfinite(statistic, value, KERNELS, CUDA)


def test_mask_follows_the_rounded_output() -> None:
    contract.check_mask(KERNELS, CUDA)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(3, 3, 2, 3), (0, 3, 2, 3)], ids=["some", "none"])
def test_stages_equal_the_definition(shape: tuple[int, ...], channels_last: bool) -> None:
    contract.check_stages(shape, channels_last, KERNELS, CUDA)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("dtype", contract.TOLERANCES)
@pytest.mark.parametrize("shape", [(5, 12), (3000, 768), (500, 8192), (40, 20000)], ids=str)
def test_layer_norm_kernels_equal_the_definition(
    shape: tuple[int, ...], dtype: torch.dtype, centred: bool, learned: bool
) -> None:
    contract.check_rows(shape, dtype, centred, learned, TritonLayerNorm.apply, CUDA)


def test_track_moves_running_statistics() -> None:
    contract.check_tracking(track, CUDA)


@each_layer
@pytest.mark.parametrize("channels_last", [False, True])
def test_wide_offsets_give_the_same_bits(
    layer: Any, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, run = make_step(layer, channels_last)
    expected = run(x)
    monkeypatch.setattr(tiles, "WIDE_FROM", 1)
    tiles._divide.cache_clear()
    tiles._divide_to_select.cache_clear()
    for wide, narrow in zip(run(x), expected, strict=True):
        assert torch.equal(wide, narrow)


@each_layer
@pytest.mark.parametrize("channels_last", [False, True])
def test_kernels_are_deterministic(layer: Any, channels_last: bool) -> None:
    x, run = make_step(layer, channels_last)
    for first, second in zip(run(x), run(x), strict=True):
        assert torch.equal(first, second)


@each_layer
def test_layers_equal_the_formula(layer: Any) -> None:
    x, run = make_step(layer, True, torch.float32)
    found = run(x)
    with norm_backend("formula"):
        expected = run(x)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


@each_layer
def test_cuda_graph_replays_batch_norms(layer: Any) -> None:
    x, run = make_step(layer, True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, which a capture must not
        run(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(x)
    x.copy_(3 * torch.randn_like(x) - 1)
    graph.replay()
    for replayed, eager in zip(captured, run(x), strict=True):
        assert torch.equal(replayed, eager)


@pytest.mark.parametrize("norm", [norms.L1LayerNorm, norms.L1RMSNorm])
def test_cuda_graph_replays_layer_norms(norm: Any) -> None:
    x = torch.randn(64, 768, device=CUDA, dtype=torch.bfloat16)
    layer = norm(768, device=CUDA)
    layer(x)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph), torch.no_grad():
        captured = layer(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(captured, layer(x))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_kernels_run_on_another_than_the_current_device() -> None:
    contract.check(contract.Case((12, 3), "top3", "relu"), KERNELS, "cuda:1")


def test_kernels_take_more_elements_than_int32_counts() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    x = torch.zeros(2**25 + 3, 65, dtype=torch.bfloat16, device=CUDA)
    x[-1, -1] = 4
    spec = NormSpec(contract.STATISTICS["linf"], 1.0, 1e-5)
    normalised = TritonBatchNorm().forward(x, None, None, None, spec)
    assert normalised.saved[4][-1].item() == len(x) - 1
    assert normalised.y[-1, -1].item() == pytest.approx(1, rel=1e-2)


def make_step(
    layer: Any, channels_last: bool, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
    """Return an input, and what makes the output and all gradients of it."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(16, 24, 30, 28, device=CUDA, dtype=dtype).contiguous(
        memory_format=memory_format
    )
    grad = torch.randn_like(x)
    norm: nn.Module = layer(24, device=CUDA, track_running_stats=False)

    def run(x: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        y = norm(leaf)
        return [y.detach(), *torch.autograd.grad(y, [leaf, *norm.parameters()], grad)]

    return x, run
