"""The tests of Triton's kernels under its interpreter, in a process of their own: test_triton.py.

TRITON_INTERPRET=1 python -m pytest tests/support/interpreted_triton.py
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import nn
from triton.runtime import interpreter

import kernel_contract as contract
from nmlightning import apply_weight_norm
from nmlightning.kernels import dispatch
from nmlightning.kernels.triton import batch_norm, tiles, weights
from nmlightning.kernels.triton.backend import TritonBackend
from nmlightning.kernels.triton.batch_norm import TritonBatchNorm, track
from nmlightning.kernels.triton.layer_norm import TritonLayerNorm
from nmlightning.norms import L1BatchNorm2d
from nmlightning.parametrizations import normalize, weight_norm

assert os.environ.get("TRITON_INTERPRET") == "1"
# numpy tells of the infinities and NaN that kernels are to get along with.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

KERNELS = TritonBatchNorm()

if triton.__version__.startswith("3.6."):
    # It makes an index of an array with one element in a way that numpy 2.5 refuses.
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_and_index


def slack(dtype: torch.dtype) -> float:
    """Return how much further the interpreter is off: it cuts bfloat16 where a GPU rounds."""
    return 2 if dtype == torch.bfloat16 else 1


@pytest.fixture(autouse=True)
def _formula() -> None:
    """Let the kernels compute, which are tested here."""


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Share each channel between programs, as of a larger tensor."""
    monkeypatch.setattr(tiles, "ALONE_BYTES", 0)
    tiles._divide.cache_clear()
    yield
    tiles._divide.cache_clear()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...]]]:
    """Return what collects the kernels that are launched, with their arguments."""
    kernels, run = [], interpreter.InterpretedFunction.run

    def note(self: Any, *arguments: Any, **options: Any) -> Any:
        kernels.append((self.fn.__name__, arguments))
        return run(self, *arguments, **options)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", note)
    return kernels


@pytest.mark.parametrize("case", [*contract.CASES, *contract.FLOAT16], ids=str)
def test_kernels_equal_the_definition(case: contract.Case, shared: None) -> None:
    contract.check(case, KERNELS, slack=slack(case.dtype))


@pytest.mark.parametrize("case", [c for c in contract.CASES if c.statistic != "linf"], ids=str)
def test_one_launch_each_way_equals_the_definition(case: contract.Case, launched: Any) -> None:
    contract.check(case, KERNELS, slack=slack(case.dtype))
    forward = 1 if case.statistic == "l1" else 3
    assert [name for name, _ in launched][forward:] == ["write_whole_gradient"]


@pytest.mark.parametrize("fused", [None, "relu", "add_relu"])
@pytest.mark.parametrize("statistic", ["l1", "top3"])
@pytest.mark.parametrize(
    ("shape", "channels_last", "dtype", "bits"),
    [
        ((7, 16, 5, 5), True, torch.float16, 1),
        ((5, 1, 8, 9), False, torch.float32, 2),
        ((4, 12, 5, 5), True, torch.bfloat16, 2),
    ],
)
def test_codes_tell_the_gradient_what_x_would(
    shape: Any, channels_last: bool, dtype: Any, bits: int, statistic: str, fused: Any,
    shared: None, launched: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    case = contract.Case(shape, statistic, fused, dtype, channels_last, "tied")
    inputs, grad = contract.draw(case, "cpu")
    spec = batch_norm.NormSpec(contract.STATISTICS[statistic], 1.25, 1e-5, fused)
    saved = KERNELS.forward(*inputs, spec).saved
    by_codes = KERNELS.backward(grad, saved, spec)
    codes = launched[-1][1][4]
    assert (codes is None) == (statistic == "top3" and fused != "relu")
    if codes is not None:
        most = bits * 2 if fused == "relu" else bits
        assert codes.numel() * codes.element_size() * 8 <= most * grad.numel()
    monkeypatch.setattr(batch_norm, "LEAST_CODED", 100)
    by_x = KERNELS.backward(grad, saved, spec)
    assert launched[-1][1][4] is None
    assert all(torch.equal(a, b) for a, b in zip(by_codes, by_x, strict=True) if a is not None)


def test_a_channel_begins_beyond_what_int32_counts() -> None:
    found = torch.zeros(4, dtype=torch.int64)
    _store_offset[(1,)](found, 37, 40, 384**3, tiles.Tile(False, 1, 1, False, 1, 1))
    assert found.tolist() == [(37 + channel) * 384**3 for channel in range(4)]


@triton.jit
def _store_offset(found, first, C, S, TILE: tl.constexpr):
    channels = first + tl.arange(0, 4)
    tl.store(found + tl.arange(0, 4), tiles.offsets_at(0 * channels, channels, C, S, TILE))


@pytest.mark.parametrize("channels_last", [False, True])
def test_parts_are_summed_in_several_steps(
    channels_last: bool, shared: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles.Partition, "fold", 2)
    contract.check(contract.Case((3, 1, 10, 14), "l1", channels_last=channels_last), KERNELS)


def test_layers_use_the_interpreted_kernels(launched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted = TritonBackend()
    monkeypatch.setattr(interpreted, "device", "cpu")
    monkeypatch.setattr(dispatch, "BACKENDS", (interpreted,))
    dispatch.clear_dispatch_cache()
    x, outputs = torch.randn(2, 2, 3, 3), []
    assert L1BatchNorm2d(2).backend_for(x).backend == "Triton"
    for name in ("auto", "formula"):
        layer, leaf = L1BatchNorm2d(2), x.clone().requires_grad_()
        with dispatch.norm_backend(name):
            y = layer(leaf)
        grads = torch.autograd.grad(y, [leaf, *layer.parameters()], x + 1)
        outputs.append([y, *grads, *layer.buffers()])
    dispatch.clear_dispatch_cache()
    # The running statistics are moved by the kernel of the output.
    assert [kernel for kernel, _ in launched] == ["write_l1_output", "write_whole_gradient"]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("statistic", ["l1", "top3"])
def test_non_finite_values_stay_in_their_channel(statistic: str, value: float) -> None:
    contract.check_nonfinite(statistic, value, KERNELS)


def test_mask_follows_the_rounded_output() -> None:
    contract.check_mask(KERNELS)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(2, 2, 2, 2), (0, 2, 2, 2)], ids=["some", "none"])
def test_stages_equal_the_definition(shape: tuple[int, ...], channels_last: bool) -> None:
    contract.check_stages(shape, channels_last, KERNELS)


@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("dtype", contract.TOLERANCES)
@pytest.mark.parametrize("shape", [(3, 333), (270, 40), (2, 1)], ids=str)
def test_layer_norm_kernels_equal_the_definition(
    shape: tuple[int, ...], dtype: torch.dtype, centred: bool
) -> None:
    learned = shape[1] != 333
    contract.check_rows(shape, dtype, centred, learned, TritonLayerNorm.apply, slack=slack(dtype))


def test_track_moves_running_statistics() -> None:
    contract.check_tracking(track)


@pytest.mark.parametrize("statistic", ["l1", "linf"])
def test_forward_moves_running_statistics(statistic: str) -> None:
    x, running = torch.randn(20, 3), [torch.zeros(3), torch.ones(3), torch.tensor(2)]
    x[4, 1] = float("nan")
    spec = batch_norm.NormSpec(contract.STATISTICS[statistic], 1.25, 1e-5)
    expected = [q.clone() for q in running]
    found = KERNELS.forward(x, None, None, None, spec, (*running, 0.25))
    track(*expected, found.mean, found.variance, 0.25)
    assert all(map(torch.equal, running, expected))
    assert running[0].bool().tolist() == [True, False, True]


@pytest.mark.parametrize("p", [1.0, 2.0, float("inf")])
def test_all_weights_take_one_launch_each_way(
    p: float, launched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 5, 3), nn.Conv2d(5, 2, 2)
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 2))
    net = net.to(memory_format=torch.channels_last)
    apply_weight_norm(net, p=p)
    rows = [layer.parametrizations.weight.original for layer in layers]
    with torch.no_grad():
        rows[1][0, 2, 0, :2] = torch.tensor([3.0, -3.0])
        if p != 2:  # whose second derivative is NaN at 0
            rows[0][1] = 0
    x, results = torch.randn(2, 3, 5, 5), []
    for kernels in (None, weights):
        for module in (normalize, weight_norm):
            monkeypatch.setattr(module, "weight_kernels", lambda device="cpu", k=kernels: k)
        net(x)  # a forward knows its weights by the last
        launched.clear()
        y = net(x).square().sum()
        grads = torch.autograd.grad(y, rows, retain_graph=True)
        names = [name for name, _ in launched]
        again = torch.autograd.grad(y, rows, create_graph=True)
        second = torch.autograd.grad(again[0].square().sum(), rows)
        results.append([y, *grads, *again, *second])
    assert names == ["normalise_rows", "write_row_gradients"]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    expected = torch.cat([torch.linalg.vector_norm(v.flatten(1), p, dim=1) for v in rows])
    torch.testing.assert_close(weights.row_norms(rows, p), expected)
