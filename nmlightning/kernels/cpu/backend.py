"""The CPU backend: the norms it supports, and the C++ kernels of each.

With a ReLU after the norm, L1's backward takes its sign from one bit an element, and that of the
largest values takes their positions. Otherwise x is only in Σ g · x̂, and where g is not 0,
x̂ = (y − residual − bias) / weight follows from the ReLU's output y. So y is kept, which the next
layer keeps anyway, and x is not.

The rounding of y to u of its size, the half of its last place, is then an error in x̂ of u · |y| /
(√3 · |weight|) in the root mean square. Of many different values its sign is random; of a constant
channel it is one and the same. It is at most the difference allowed between backends (5e-7 in
float32, 4e-3 in bfloat16) while y is below `reach_without_x` times the weight: the tolerance · √3 /
u, with u = 2^-24 and 2^-8. For a ReLU alone that is bias ≤ reach · |weight|, since a negative bias
makes y smaller; after an addition, it is the root mean square of y in a channel. Where it does not
hold in every channel of a layer, x is kept, in this pass, for the layer. So it is after the
addition in bfloat16.
"""

import warnings
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmlightning.functional.statistics import LargestMean, RangeMean, Statistic
from nmlightning.kernels import interface
from nmlightning.kernels.cpu import build
from nmlightning.kernels.interface import OptTensor

_DTYPES = (torch.float32, torch.bfloat16)
_NUMBERS: dict[interface.Fused | None, int] = {None: 0, "relu": 1, "add_relu": 2}


class CpuBatchNorm:
    """The interface `BatchNormKernels`, by `torch.ops.nmlightning`; some are its very operators."""

    def __init__(self) -> None:
        self._ops = ops = torch.ops.nmlightning
        self.sums, self.sums_of_sizes, self.largest = ops.sums, ops.sums_of_sizes, ops.largest
        self.gradient = ops.gradient

    def batch_norm(self, statistic: Statistic) -> interface.Normalise:
        """Return one operator: forward, its node in autograd's graph, and running statistics."""
        k = statistic.k if isinstance(statistic, LargestMean) else 0
        if isinstance(statistic, RangeMean):
            k = -statistic.chunks
        return partial(self._ops.batch_norm.default, k)

    def affine(
        self,
        x: Tensor,
        residual: OptTensor,
        mean: Tensor,
        gain: Tensor,
        bias: Tensor,
        fused: interface.Fused | None,
    ) -> Tensor:
        return self._ops.affine(x, residual, mean, gain, bias, _NUMBERS[fused])  # type: ignore[no-any-return]

    def gradient_sums(
        self, grad: Tensor, x: Tensor, y: OptTensor, mean: Tensor, statistic: Statistic
    ) -> Tensor:
        return self._ops.gradient_sums(grad, x, y, mean, interface.is_l1(statistic))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class CpuBackend:
    """The kernels in C++. Their library is loaded when it is first asked for, never built."""

    folder: Path = field(default_factory=build.cache_folder)
    name = "C++"
    device = "cpu"

    def unsupported_reason(self, key: interface.DispatchKey) -> str:
        return interface.unsupported_norm(key, _DTYPES, has_range=True) or first_missing(self)

    def kernels(self, key: interface.DispatchKey) -> Any:
        from nmlightning.kernels import autograd  # noqa: F401  # which registers second derivatives

        return CpuBatchNorm() if key.kind == "batch" else torch.ops.nmlightning.layer_norm.default

    def tracking(self) -> interface.Tracking | None:
        """Return what moves running statistics, or None where it is not built."""
        return None if first_missing(self) else torch.ops.nmlightning.track

    def weights(self) -> Any:
        return None if first_missing(self) else torch.ops.nmlightning

    def _missing(self) -> str:
        if build.is_loaded():
            return ""
        reason = _load(build.library_path(self.folder))
        if reason not in ("", build.NOT_BUILT, build.BEING_BUILT):
            _warn(reason)
        return reason


@cache
def first_missing(backend: CpuBackend) -> str:
    """Return why there is no library, once and for all: a later one is for the next start."""
    return backend._missing()


def _load(path: Path) -> str:
    """Load the library, or return why not."""
    reason = build.unusable_reason(path)
    if not reason:
        try:
            build.load_library(path)
        except OSError:
            return f"the kernels in {path} do not load: nm kernels remove"
    if reason or build.is_loaded():
        return reason
    return f"{path} holds other operators than the kernels': nm kernels remove"


@cache
def _warn(reason: str) -> None:
    """Say it once, since norms are then slower than the user has reason to expect."""
    warnings.warn(f"The norms use the formula: {reason}.", stacklevel=2)
