"""The Triton backend: the norms it supports. Triton and the kernels are imported on first use."""

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch

from nmlightning.functional.statistics import LargestMean
from nmlightning.kernels.interface import DispatchKey, Tracking, unsupported_norm

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_K = 64  # the time of a selection is in proportion to k
LEAST_CAPABILITY = (8, 0)  # what the kernels are compiled for in the tests


class TritonBackend:
    """Kernels for CUDA, compiled by Triton when they are first used."""

    name = "Triton"
    device = "cuda"

    def unsupported_reason(self, key: DispatchKey) -> str:
        reason = _unsupported_machine() or unsupported_norm(key, DTYPES)
        too_many = isinstance(key.statistic, LargestMean) and key.statistic.k > LARGEST_K
        return reason or (f"no kernel for k above {LARGEST_K}" if too_many else "")

    def kernels(self, key: DispatchKey) -> Any:
        if key.kind == "batch":
            from nmlightning.kernels.triton.batch_norm import TritonBatchNorm

            return TritonBatchNorm()
        from nmlightning.kernels.triton.layer_norm import TritonLayerNorm

        return TritonLayerNorm.apply

    def tracking(self) -> Tracking | None:
        if _unsupported_machine():
            return None
        from nmlightning.kernels.triton.batch_norm import track

        return track

    def weights(self) -> Any:
        if _unsupported_machine() or not torch.cuda.is_available():
            return None
        from nmlightning.kernels.triton import weights

        return weights


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Return whether Triton is installed; torch's wheels for CPUs, macOS and Windows lack it."""
    return find_spec("triton") is not None


def _unsupported_machine() -> str:
    if torch.version.hip:
        return "no kernel for ROCm"
    if not has_triton():
        return "triton is not installed"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        return "no kernel below compute capability 8.0"
    return ""
