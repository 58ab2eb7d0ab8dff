"""What Triton's kernels serve; this module imports neither Triton nor a kernel."""

from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from nmlightning.functional.statistics import LargestMean
from nmlightning.kernels.interface import is_l1, is_largest

if TYPE_CHECKING:
    from nmlightning.kernels.dispatch import Case


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_K = 64  # the time of a selection is in proportion to k
LEAST_CAPABILITY = (8, 0)  # what the kernels are compiled for in the tests


class TritonBackend:
    """Kernels for CUDA, compiled by Triton when they are first used."""

    name = "Triton"
    device = "cuda"

    def refusal(self, case: "Case") -> str:
        """Return why it does not serve the case, in a few words; nothing if it does."""
        return (
            _refusal_of_machine()
            or _refusal_of_dtypes(case)
            or (_refusal_of_batch_norm(case) if case.kind == "batch" else _refusal_of_rows(case))
        )

    def kernels(self, case: "Case") -> Any:
        """Return the kernels of a case that is served."""
        if case.kind == "batch":
            from nmlightning.kernels.triton.batch_norm import TritonBatchNorm

            return TritonBatchNorm()
        from nmlightning.kernels.triton.layer_norm import TritonLayerNorm

        return TritonLayerNorm(centred=case.kind == "layer")

    def tracking(self) -> Any:
        """Return what moves running statistics, or None where torch's own operations do."""
        if _refusal_of_machine():
            return None
        from nmlightning.kernels.triton.track import track

        return track


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Return whether Triton is installed; torch's wheels for CPUs, macOS and Windows lack it."""
    return find_spec("triton") is not None


def _refusal_of_machine() -> str:
    if torch.version.hip:
        return "no kernel for ROCm"
    if not has_triton():
        return "triton is not installed"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        return "no kernel below compute capability 8.0"
    return ""


def _refusal_of_dtypes(case: "Case") -> str:
    if case.dtype not in DTYPES:
        return f"no kernel for {_plain(case.dtype)}"
    if case.stats_dtype != torch.float32:
        return f"no kernel with statistics in {_plain(case.stats_dtype)}"
    return ""


def _refusal_of_batch_norm(case: "Case") -> str:
    if case.layout == "other":
        return "no kernel for strided elements"
    if not (is_l1(case.statistic) or is_largest(case.statistic)):
        return f"no kernel for {case.statistic}"
    if isinstance(case.statistic, LargestMean) and case.statistic.k > LARGEST_K:
        return f"no kernel for k above {LARGEST_K}"
    return ""


def _refusal_of_rows(case: "Case") -> str:
    if case.layout != "NCHW":
        return "no kernel for strided elements"
    return "" if is_l1(case.statistic) else f"no kernel for {case.statistic}"


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
