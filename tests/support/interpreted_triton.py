"""The tests of Triton's kernels under its interpreter, in a process of their own: test_triton.py.

TRITON_INTERPRET=1 python -m pytest tests/support/interpreted_triton.py
"""

import os
from typing import Any

import pytest
import torch
import triton
from triton.runtime import interpreter

import kernel_contract as contract
from nmlightning.kernels import dispatch
from nmlightning.kernels.triton import tiles
from nmlightning.kernels.triton.backend import TritonBackend
from nmlightning.kernels.triton.batch_norm import TritonBatchNorm, track
from nmlightning.kernels.triton.layer_norm import TritonLayerNorm
from nmlightning.norms import L1BatchNorm2d

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


@pytest.mark.parametrize("case", [*contract.CASES, *contract.FLOAT16], ids=str)
def test_kernels_equal_the_definition(case: contract.Case) -> None:
    contract.check(case, KERNELS, slack=slack(case.dtype))


@pytest.mark.parametrize("channels_last", [False, True])
def test_parts_are_summed_in_several_steps(
    channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles.Partition, "fold", 2)
    contract.check(contract.Case((3, 1, 10, 14), "l1", channels_last=channels_last), KERNELS)


def test_layers_use_the_interpreted_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted = TritonBackend()
    monkeypatch.setattr(interpreted, "device", "cpu")
    monkeypatch.setattr(dispatch, "BACKENDS", (interpreted,))
    dispatch.clear_dispatch_cache()
    layer, x = L1BatchNorm2d(2), torch.randn(2, 2, 3, 3)
    assert layer.backend_for(x).backend == "Triton"
    outputs = []
    for name in ("auto", "formula"):
        leaf = x.clone().requires_grad_()
        with dispatch.norm_backend(name):
            y = layer(leaf)
        outputs.append([y, *torch.autograd.grad(y, [leaf, *layer.parameters()], x + 1)])
    dispatch.clear_dispatch_cache()
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
    kernels, learned = TritonLayerNorm(centred), shape[1] != 333
    contract.check_rows(shape, dtype, centred, learned, kernels, slack=slack(dtype))


def test_track_moves_running_statistics() -> None:
    contract.check_tracking(track)
