"""The interface of every kernel backend: what it is asked for and what it answers.

With d = x − μ, ŝ = c · m(d), σ = √(ŝ² + eps): y = d · weight/σ + bias; then ReLU(y) for "relu" and
ReLU(y + residual) for "add_relu". All that is per channel, (C,), is float32.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from nmlightning.functional.statistics import LargestMean, PowerMean, Statistic

Fused = Literal["relu", "add_relu"]


@dataclass(frozen=True)
class Job:
    """A batch norm: which statistic m, its constant c, eps, and what follows in the same kernel."""

    statistic: Statistic
    constant: float
    eps: float
    fused: Fused | None = None


class Normalised(NamedTuple):
    """y like x; mean (C,); unbiased variance ŝ² · n/(n − 1) (C,); what backward needs."""

    y: Tensor
    mean: Tensor
    variance: Tensor
    saved: tuple[Tensor | None, ...]


class Gradients(NamedTuple):
    """By x and the residual, like them; by weight and bias, (C,) float32."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor


class BatchNormKernels(Protocol):
    """The kernels of a backend for (N, C, *spatial), contiguous or with the channels last."""

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        job: Job,
    ) -> Normalised:
        """Return the normalised x, with n > 1 elements a channel.

        Args:
            x: of a dtype that the backend serves.
            residual: like x, with the same strides; None unless `job.fused` is "add_relu".
            weight: (C,) float32, or None for 1.
            bias: (C,) float32, or None for 0.
            job: what is to be computed.
        """

    def backward(self, grad: Tensor, saved: tuple[Tensor | None, ...], job: Job) -> Gradients:
        """Return the gradients that follow from `grad`, like y in dtype, of any strides."""

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
        residual: Tensor | None,
        mean: Tensor,
        gain: Tensor,
        bias: Tensor,
        fused: Fused | None,
    ) -> Tensor:
        """Return (x − μ) · gain + bias, plus the residual and through ReLU if fused."""

    def gradient_sums(
        self, grad: Tensor, x: Tensor, y: Tensor | None, mean: Tensor, statistic: Statistic
    ) -> Tensor:
        """Return Σg, Σ g · (x − μ) and, for L1, Σs (0 for others), (3, C).

        g is `grad` where y > 0 and 0 elsewhere, if y is given; s is +1 where x > μ, else −1.
        """

    def gradient(
        self,
        grad: Tensor,
        x: Tensor,
        y: Tensor | None,
        mean: Tensor,
        gain: Tensor,
        offset: Tensor,
        pull: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return gain · g + offset − pull · s (without the last if there is no pull), and g."""


def is_l1(statistic: Statistic) -> bool:
    """Return whether the statistic is the mean of |d|."""
    return statistic == PowerMean(1.0)


def is_largest(statistic: Statistic) -> bool:
    """Return whether the statistic is the mean of the k largest |d|, or the largest."""
    return isinstance(statistic, LargestMean)


Layout = Literal["NCHW", "NHWC", "other"]
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


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
    if x.is_contiguous():
        return tensor.contiguous()
    return tensor.contiguous(memory_format=_CHANNELS_LAST[x.dim()])
