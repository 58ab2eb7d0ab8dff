"""Layers that take the place of layer and RMS norms and measure nothing: tanh and erf of αx."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from nmlightning.errors import check_positive
from nmlightning.norms.layer_norm import FeatureLayerNorm, FeatureNorm, FeatureRMSNorm


class NormFree(FeatureNorm):
    """What the norm-free layers share: a learned α, which a swap adds and a swap back removes."""

    scalars: ClassVar[Mapping[str, float]] = {"alpha": 1.0}  # first values, over alpha_init
    alpha: nn.Parameter
    alpha_init: float

    def _learn(
        self, alpha_init: float, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        check_positive(alpha_init=alpha_init)
        self.alpha_init = alpha_init
        self.add_scalars(torch.empty(0, device=device, dtype=dtype))
        self._set_statistic(2.0, "none", None)

    def add_scalars(self, like: Tensor) -> None:
        """Register the learned scalars at their first values, of the dtype and device of `like`."""
        for name, value in self.scalars.items():
            scalar = like.new_full((1,), value * self.alpha_init)
            self.register_parameter(name, nn.Parameter(scalar))

    def reset_parameters(self) -> None:
        """Make the layer what it was when it was new."""
        super().reset_parameters()  # type: ignore[misc]
        if "alpha" in self._parameters:
            self.add_scalars(self.alpha.detach())

    def function(self, x: Tensor) -> Tensor:
        """Return what comes before weight and bias, elementwise, in the dtype of x."""
        return torch.tanh(self.alpha.to(x.dtype) * x)

    def formula(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *_: object) -> Tensor:
        """Return function(x) · weight + bias."""
        y = self.function(x)
        y = y if weight is None else y * weight.to(y.dtype)
        return y if bias is None else y + bias.to(y.dtype)


class DynamicTanh(NormFree, FeatureLayerNorm):
    """Dynamic tanh (DyT) in the place of a layer norm: no mean, no deviation, one learned α.

        y = tanh(α x) · weight + bias

    It squashes each element for itself, in the dtype of the input. α, of shape (1,), is learned and
    not to be decayed. Unlike behind a norm, the loss depends on the norm of the weights before it.

    Args:
        normalized_shape: sizes of the last dimensions, or the size of the last one.
        eps: no part of the formula; kept for a swap back.
        elementwise_affine: learn a weight for each feature.
        bias: learn a bias for each feature too.
        alpha_init: the first α. The authors take 0.5, and in language models from 0.2, where they
            are wide, to 1, the larger one before attention.

    Raises:
        InputError: a setting outside what is allowed; an input that ends in other sizes.

    Examples:
        >>> DynamicTanh(8)(100 * torch.randn(2, 3, 8)).abs().max() <= 1
        tensor(True)

    Source: Zhu et al. 2025 (arXiv 2503.10622).
    """

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float = 1e-5,
        elementwise_affine: bool = True, bias: bool = True, *, alpha_init: float = 0.5,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self._learn(alpha_init, device, dtype)


class RMSDynamicTanh(NormFree, FeatureRMSNorm):
    """Dynamic tanh in the place of an RMS norm: tanh(α x) · weight. See `DynamicTanh`.

    Examples:
        >>> RMSDynamicTanh(8)(100 * torch.randn(2, 3, 8)).abs().max() <= 1
        tensor(True)
    """

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float | None = None,
        elementwise_affine: bool = True, *, alpha_init: float = 0.5,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self._learn(alpha_init, device, dtype)


class Erf(NormFree):
    """The function of `DynamicErf`, with a learned shift s beside α."""

    scalars: ClassVar[Mapping[str, float]] = {"alpha": 1.0, "shift": 0.0}
    shift: nn.Parameter

    def function(self, x: Tensor) -> Tensor:
        """Return what comes before weight and bias, elementwise, in the dtype of x."""
        return torch.erf(torch.addcmul(self.shift.to(x.dtype), self.alpha.to(x.dtype), x))


class DynamicErf(Erf, DynamicTanh):
    """Derf in the place of a layer norm: erf(α x + s) · weight + bias, s from 0 on.

    As `DynamicTanh`, with the error function and a learned shift s of shape (1,).

    Examples:
        >>> DynamicErf(8)(100 * torch.randn(2, 3, 8)).abs().max() <= 1
        tensor(True)

    Source: Chen et al. 2025 (arXiv 2512.10938).
    """


class RMSDynamicErf(Erf, RMSDynamicTanh):
    """Derf in the place of an RMS norm: erf(α x + s) · weight. See `DynamicErf`.

    Examples:
        >>> RMSDynamicErf(8)(100 * torch.randn(2, 3, 8)).abs().max() <= 1
        tensor(True)
    """
