"""Layer norms by any power mean."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nmlightning.errors import check_flag
from nmlightning.norms.gaussian import Constant, check_constant, check_power
from nmlightning.norms.layer_norm_function import check_normalized_shape, normalise_features
from nmlightning.norms.settings import check_eps, check_stats_dtype, describe_settings
from nmlightning.norms.statistics import PowerMean


class LpLayerNorm(nn.LayerNorm):
    """Layer norm that divides by ŝ = c(p) · (mean |x − μ|^p)^(1/p), p ≥ 1.

        y = (x − μ) / √(ŝ² + eps) · weight + bias

    μ and ŝ are taken over the last dimensions, those of `normalized_shape`, in `stats_dtype`.
    p = 2 is torch's own layer norm. It can be differentiated once.

    Args:
        normalized_shape: sizes of the last dimensions, or the size of the last one.
        p: the power, at least 1.
        eps: added to the variance ŝ².
        elementwise_affine: learn a weight for each feature.
        bias: learn a bias for each feature too.
        constant: c. "exact" and "paper" are the Gaussian's, √(π/2) for p = 1; "none" is 1; a
            number is taken as it is.
        stats_dtype: dtype of accumulation: `torch.float32` or `torch.float64`; by default float32,
            and float64 for float64 inputs. Or `torch.float16` or `torch.bfloat16`: then all is
            computed in that dtype, whatever the input's (pure half).

    Raises:
        InputError: a setting outside what is allowed; an input that ends in other sizes.

    Example:
        >>> LpLayerNorm(8, p=1.5)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])

    Source: Hoffer et al. 2018, §4 (arXiv 1803.01814).
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        p: float = 1.0,
        *,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        constant: Constant | float = "exact",
        stats_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            check_normalized_shape(normalized_shape),
            check_eps(eps),
            check_flag("elementwise_affine", elementwise_affine),
            bias=check_flag("bias", bias),
            device=device,
            dtype=dtype,
        )
        self.p = check_power(p)
        self.constant = check_constant(constant)
        self.stats_dtype = check_stats_dtype(stats_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised input, in its dtype."""
        constant = PowerMean(self.p).constant(math.prod(self.normalized_shape), self.constant)
        return normalise_features(
            input, self, self.bias, constant=constant, eps=self.eps, centred=True
        )

    def extra_repr(self) -> str:
        """Return the arguments that differ from the defaults, so that the repr evaluates."""
        return describe_settings(self, str(tuple(self.normalized_shape)))


class L1LayerNorm(LpLayerNorm):
    """Layer norm by ŝ = √(π/2) · mean |x − μ|; see `LpLayerNorm`, without its p.

    >>> L1LayerNorm(8)(torch.randn(2, 3, 8)).shape
    torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        *,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
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
            bias=bias,
            constant=constant,
            stats_dtype=stats_dtype,
            device=device,
            dtype=dtype,
        )
