"""RMS norms by any power mean: layer norms that do not subtract the mean."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nmlightning.errors import check_flag
from nmlightning.norms.gaussian import Constant, check_constant, check_power
from nmlightning.norms.layer_norm_function import check_normalized_shape, normalise_features
from nmlightning.norms.settings import check_eps, check_stats_dtype, describe_settings
from nmlightning.norms.statistics import PowerMean


class LpRMSNorm(nn.RMSNorm):
    """RMS norm that divides by ŝ = c(p) · (mean |x|^p)^(1/p), p ≥ 1, and does not centre.

        y = x / √(ŝ² + eps) · weight

    ŝ is taken over the last dimensions, those of `normalized_shape`, in `stats_dtype`. p = 2 is
    torch's own RMS norm. It can be differentiated once; the slope of |x| at 0 is −1.

    Args:
        normalized_shape: sizes of the last dimensions, or the size of the last one.
        p: the power, at least 1.
        eps: added to ŝ². None is torch's: what float32 has between 1 and the next number, 1.2e-7,
            and for float64 inputs 2.2e-16.
        elementwise_affine: learn a weight for each feature.
        constant: c. "exact" and "paper" make ŝ the standard deviation of Gaussian x of mean 0,
            √(π/2) for p = 1; "none" is 1; a number is taken as it is.
        stats_dtype: as in `LpLayerNorm`.

    Raises:
        InputError: a setting outside what is allowed; an input that ends in other sizes.

    Example:
        >>> LpRMSNorm(8, p=1.5)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])

    Source: Zhang & Sennrich 2019 (arXiv 1910.07467), with the statistics of Hoffer et al. 2018, §4
    (arXiv 1803.01814).
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        p: float = 1.0,
        *,
        eps: float | None = None,
        elementwise_affine: bool = True,
        constant: Constant | float = "exact",
        stats_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            check_normalized_shape(normalized_shape),
            None if eps is None else check_eps(eps),
            check_flag("elementwise_affine", elementwise_affine),
            device=device,
            dtype=dtype,
        )
        self.p = check_power(p)
        self.constant = check_constant(constant)
        self.stats_dtype = check_stats_dtype(stats_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised input, in its dtype."""
        constant = PowerMean(self.p).constant(math.prod(self.normalized_shape), self.constant)
        eps = _eps_of(x.dtype) if self.eps is None else self.eps
        return normalise_features(x, self, None, constant=constant, eps=eps, centred=False)

    def extra_repr(self) -> str:
        """Return the arguments that differ from the defaults, so that the repr evaluates."""
        return describe_settings(self, str(tuple(self.normalized_shape)))


class L1RMSNorm(LpRMSNorm):
    """RMS norm by ŝ = √(π/2) · mean |x|; see `LpRMSNorm`, without its p.

    >>> L1RMSNorm(8)(torch.randn(2, 3, 8)).shape
    torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        *,
        eps: float | None = None,
        elementwise_affine: bool = True,
        constant: Constant | float = "exact",
        stats_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            normalized_shape,
            1.0,
            eps=eps,
            elementwise_affine=elementwise_affine,
            constant=constant,
            stats_dtype=stats_dtype,
            device=device,
            dtype=dtype,
        )


def _eps_of(dtype: torch.dtype) -> float:
    """Return what torch adds by default; for half inputs it is that of float32, too."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps
