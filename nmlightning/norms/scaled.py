"""Layer and RMS norms that square nothing above 1, for runtimes that compute them in half."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nmlightning.errors import check_choice, given_by_keyword
from nmlightning.norms.batch_norm_base import accumulation_dtype
from nmlightning.norms.layer_norm import FeatureLayerNorm, FeatureNorm, FeatureRMSNorm

# The least divisor, in every dtype: a graph in float32 may be made one in float16.
_LEAST = torch.finfo(torch.float16).tiny


def normalise_scaled(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, rank: int, eps: float, centred: bool,
    p: float = 2.0,
) -> Tensor:  # fmt: skip
    """Return x, (*, *normalized_shape), normalised over its last `rank` dimensions, in its dtype.

    The sizes k and m cancel, and the first mean as well, so none of them has a gradient.
    """
    accumulation_dtype(x.dtype, None)  # InputError for what has no norm
    dims, root = tuple(range(-rank, 0)), math.sqrt(eps)
    if centred:
        largest = _largest(x, dims, _LEAST)
        mean = largest * _mean((x / largest).detach(), dims)
        x, root = x / 2 - mean / 2, root / 2
    largest = _largest(x, dims, max(root, _LEAST))
    # √eps / m of normal numbers alone, and no number over a tensor: Core ML's inverse adds 1e-4.
    u, added = x / largest, largest.new_full((), _LEAST) / largest * (root / _LEAST)
    u = u - _mean(u, dims) if centred else u
    y = u / (_mean_square(u, dims, p) + added * added).sqrt()
    y = y if weight is None else y * _like(weight, y)
    return y if bias is None else y + _like(bias, y)


def _mean_square(u: Tensor, dims: tuple[int, ...], p: float) -> Tensor:
    """Return mean u², or (√(π/2) · mean |u|)²; by products, since autocast squares in float32."""
    if p == 2:
        return _mean(u * u, dims)
    scale = math.sqrt(math.pi / 2) * _mean(u.abs(), dims)
    return scale * scale


def _like(parameter: Tensor, y: Tensor) -> Tensor:
    """Return a parameter in the dtype of y; a cast would fix that of an exported program."""
    return parameter if parameter.dtype == y.dtype else parameter.to(y.dtype)


def _largest(x: Tensor, dims: tuple[int, ...], least: float) -> Tensor:
    return x.detach().abs().amax(dims, keepdim=True).clamp_min(least)


def _mean(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return the mean of values up to 1; of several dimensions in turn, so that no sum is large."""
    for dim in dims:
        x = x.mean(dim, keepdim=True)
    return x


class Scaled(FeatureNorm):
    """What the scaled norms share."""

    def formula(self, x: Tensor, *settings: Any) -> Tensor:
        """Return what `normalise_scaled` does with this p."""
        weight, bias, rank, eps, centred = settings
        return normalise_scaled(x, weight, bias, rank, eps, centred, self.p)


class ScaledLayerNorm(Scaled, FeatureLayerNorm):
    """`nn.LayerNorm` of the same state and output, right also with every value in float16.

        k = max |x|,    μ = k · mean(x / k),    d = (x − μ) / 2,    m = max(|d|, √eps / 2),
        u = d / m − mean(d / m),    y = u / √(mean u² + (√eps / 2m)²) · weight + bias

    Maxima, at least 6.1e-5, and means are over the last dimensions, those of `normalized_shape`,
    and all is in the dtype of the input, whose range no value and no square exceeds. Halves, since
    x − μ may; the mean of d / m is what rounding left in μ. In float32 the error is 2 · 2⁻²³ of the
    largest output, 4 · 2⁻²³ beside an outlier, also where μ is large. It has no kernels of its own.

    Args:
        normalized_shape: sizes of the last dimensions, or the size of the last one.
        eps: added to the variance.
        elementwise_affine: learn a weight for each feature.
        bias: learn a bias for each feature too.
        p: 2, or 1 for an L1 layer norm, with (√(π/2) · mean |u|)² in the place of mean u².

    Raises:
        InputError: a setting outside what is allowed; an input that ends in other sizes, or is not
            of real floating-point numbers.

    Examples:
        >>> ScaledLayerNorm(8)(1e4 * torch.randn(2, 3, 8).half()).isfinite().all()
        tensor(True)

    Source: the scaled sum of squares of BLAS' nrm2 (Blue 1978, doi 10.1145/355769.355771).
    """

    @given_by_keyword("p")
    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float = 1e-5,
        elementwise_affine: bool = True, bias: bool = True, *, p: float = 2.0,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        check_choice("p", p, (1, 2))
        self._set_statistic(p, "exact", None)


class ScaledRMSNorm(Scaled, FeatureRMSNorm):
    """`nn.RMSNorm` of the same state and output, right also with every value in float16.

        m = max(|x|, √eps),    u = x / m,    y = u / √(mean u² + (√eps / m)²) · weight

    As `ScaledLayerNorm`, which see. eps is added to the mean square; None is torch's for float32.

    Examples:
        >>> ScaledRMSNorm(8)(1e4 * torch.randn(2, 3, 8).half()).isfinite().all()
        tensor(True)
    """

    @given_by_keyword("p")
    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float | None = None,
        elementwise_affine: bool = True, *, p: float = 2.0,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        check_choice("p", p, (1, 2))
        self._set_statistic(p, "exact", None)
