"""The interface between norms and kernel backends: requests, answers, and memory layouts.

With d = x − μ, ŝ = c · m(d), σ = √(ŝ² + eps): y = d · weight/σ + bias; then ReLU(y) for "relu" and
ReLU(y + residual) for "add_relu". All that is per channel, (C,), is float32.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from nmlightning.functional.statistics import LargestMean, PowerMean, RangeMean, Statistic

NormKind = Literal["batch", "layer", "rms"]
Fused = Literal["relu", "add_relu"]
Layout = Literal["NCHW", "NHWC", "other"]
OptTensor = Tensor | None
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class DispatchKey(NamedTuple):
    """All that the choice of a backend depends on."""

    kind: NormKind
    statistic: Statistic
    device: str
    dtype: torch.dtype
    stats_dtype: torch.dtype
    layout: Layout


class Dispatch(NamedTuple):
    """A backend's name, and its kernels; or "formula", the reason for that, and no kernels."""

    backend: str
    reason: str
    kernels: Any = None


Normalise = Callable[..., list[Tensor]]
"""Given x, residual, weight, bias, running mean and variance, the count of batches, the constant c,
eps, momentum and `Fused`: returns y; and μ and the unbiased variance ŝ² · n/(n − 1), (C,) float32,
unless it has moved the running statistics. Or nothing, where it cannot, and has changed nothing."""
Tracking = Callable[[Tensor, Tensor, OptTensor, Tensor, Tensor, float | None], bool]
"""Given running mean and variance, the count of batches, the batch's mean and variance, momentum:
moves, in channels where both are finite, each running value that stays so, and counts the batch.
Returns whether it could, which it cannot without a momentum; else it has changed nothing."""


class Backend(Protocol):
    """Kernels for one type of device."""

    @property
    def name(self) -> str:
        """Such as "C++" or "Triton"."""

    @property
    def device(self) -> str:
        """The type of device that it is for."""

    def unsupported_reason(self, key: DispatchKey) -> str:
        """Return in a few words why it has no kernels for the key; nothing if it has."""

    def kernels(self, key: DispatchKey) -> Any:
        """Return the `BatchNormKernels` or the `LayerNorm` of a key that is supported."""

    def tracking(self) -> Tracking | None:
        """Return what moves running statistics, or None where torch's own operations do."""

    def weights(self) -> Any:
        """Return what has `normalise_weights` and `row_norms` of many weights, or None."""


@dataclass(frozen=True)
class NormSpec:
    """A batch norm: its statistic m, the constant c, eps, and what follows in the same kernel."""

    statistic: Statistic
    constant: float
    eps: float
    fused: Fused | None = None


class Normalised(NamedTuple):
    """y like x; mean (C,); unbiased variance ŝ² · n/(n − 1) (C,); what backward needs."""

    y: Tensor
    mean: Tensor
    variance: Tensor
    saved: tuple[OptTensor, ...]


class Gradients(NamedTuple):
    """By x and the residual, like them; by weight and bias, (C,) float32."""

    x: Tensor
    residual: OptTensor
    weight: Tensor
    bias: Tensor


class BatchNormKernels(Protocol):
    """The kernels of a backend for (N, C, *spatial), contiguous or with the channels last."""

    def batch_norm(self, statistic: Statistic) -> Normalise:
        """Return the batch norm of one process."""

    # The stages of the same, for ranks that share their statistics between them. A rank may have
    # no elements.

    def sums(self, x: Tensor) -> Tensor:
        """Return Σx of each channel, (C,)."""

    def sums_of_sizes(self, x: Tensor, mean: Tensor) -> Tensor:
        """Return Σ|x − μ| of each channel, (C,)."""

    def largest(self, x: Tensor, mean: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the positions, int64, and the x − μ of the k largest |x − μ|, (C, k) each.

        Largest first, among equals the first position; positions count along (N, *spatial).
        A rank with fewer than k elements fills up with 0 at position 0.
        """

    def affine(
        self,
        x: Tensor,
        residual: OptTensor,
        mean: Tensor,
        gain: Tensor,
        bias: Tensor,
        fused: Fused | None,
    ) -> Tensor:
        """Return (x − μ) · gain + bias, plus the residual and through ReLU if fused."""

    def gradient_sums(
        self, grad: Tensor, x: Tensor, y: OptTensor, mean: Tensor, statistic: Statistic
    ) -> Tensor:
        """Return Σg, Σ g · (x − μ) and, for L1, Σs (0 for others), (3, C).

        g is `grad` where y > 0 and 0 elsewhere, if y is given; s is +1 where x > μ, else −1.
        """

    def gradient(
        self,
        grad: Tensor,
        x: Tensor,
        y: OptTensor,
        mean: Tensor,
        gain: Tensor,
        offset: Tensor,
        pull: OptTensor,
    ) -> tuple[Tensor, Tensor]:
        """Return gain · g + offset − pull · s (without the last if there is no pull), and g."""


LayerNorm = Callable[[Tensor, OptTensor, OptTensor, int, float, float, bool], OptTensor]
"""Given x, weight, bias, the number of normalised dimensions, c, eps, and whether to centre: y,
which autograd connects to them; None where sums may not be finite."""


def unsupported_norm(
    key: DispatchKey, dtypes: Collection[torch.dtype], has_range: bool = False
) -> str:
    """Return in a few words why kernels for such inputs do not compute the norm, or nothing."""
    batch = key.kind == "batch"
    selects = isinstance(key.statistic, (LargestMean, *[RangeMean] * has_range))
    if not (is_l1(key.statistic) or (batch and selects)):
        return f"no kernel for {key.statistic.name}"
    if key.dtype not in dtypes:
        return f"no kernel for {_name(key.dtype)}"
    if key.stats_dtype != torch.float32:
        return f"no kernel for statistics in {_name(key.stats_dtype)}"
    if batch and key.layout == "other":
        return "no kernel for elements in this order"
    return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_l1(statistic: Statistic) -> bool:
    return statistic == PowerMean(1.0)


def layout_of(x: Tensor) -> Layout:
    """Return "NCHW" for contiguous elements, "NHWC" for those with the channels last."""
    if x.is_contiguous():
        return "NCHW"
    memory_format = _CHANNELS_LAST.get(x.dim())
    if memory_format is not None and x.is_contiguous(memory_format=memory_format):
        return "NHWC"
    return "other"


def lay_out_like(tensor: Tensor, x: Tensor) -> Tensor:
    """Return `tensor`, copied unless its elements lie as those of x do, which has a layout."""
    tensor = tensor.resolve_neg()
    if x.is_contiguous():
        return tensor.contiguous()
    return tensor.contiguous(memory_format=_CHANNELS_LAST[x.dim()])
