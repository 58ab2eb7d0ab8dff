"""Layer and RMS norms by any power mean: layers, and their analytic forward and backward.

The same formula as in `functional.batch_norm`, with one μ and ŝ for each token (the features of
`normalized_shape`) and a weight and bias for each feature:

    ∂L/∂x = (1/σ) · [h − mean h − c · (ŝ/σ) · mean(h x̂) · (s − mean s)],   h = weight · g

where s = count · ∂m/∂d is the slope of the power mean, of which the code has the reflection −s.
An RMS norm has μ = 0, and so neither mean h nor mean s.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nmlightning.errors import InputError, check_flag, given_by_keyword
from nmlightning.functional import reductions, statistics
from nmlightning.functional.batch_norm import apply_without_autocast, differentiable
from nmlightning.functional.constants import Constant, check_constant, check_power
from nmlightning.functional.plain import plain_layer_norm
from nmlightning.kernels import dispatch
from nmlightning.kernels.interface import Dispatch, DispatchKey, LayerNorm, NormKind
from nmlightning.norms import batch_norm_base
from nmlightning.norms.fast_path import named_modules_in_encoder, refuse_scripting, traceable


def check_normalized_shape(normalized_shape: int | Sequence[int]) -> list[int]:
    """Return the sizes of the last dimensions, or raise InputError where there are none."""
    sizes = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
    if not sizes or math.prod(sizes) < 1:
        raise InputError(f"normalized_shape must have sizes of at least 1, got {sizes}.")
    return sizes


def normalise_features(
    x: Tensor,
    layer: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    sizes: tuple[int, ...],
    eps: float | None,
    *,
    centred: bool,
) -> Tensor:
    """Return x, (*, *sizes), normalised as a layer or RMS norm is set, in its dtype.

    By default eps is what torch's RMS norm adds; for half inputs it is that of float32, too.

    Raises:
        InputError: an input that ends in other sizes, or is not of real floating-point numbers.
    """
    if x.is_nested:
        same = (layer, weight, bias, sizes, eps)
        parts = [normalise_features(part, *same, centred=centred) for part in x.unbind()]
        nested: Tensor = torch.nested.as_nested_tensor(parts, layout=x.layout)
        return nested
    if x.shape[-len(sizes) :] != sizes:
        raise InputError(
            f"{type(layer).__name__} normalises the last dimensions {sizes}, "
            f"got an input of shape {tuple(x.shape)}."
        )
    kind: NormKind = "layer" if centred else "rms"
    settings = (layer.constant, sizes, eps, x.dtype, layer.stats_dtype)
    if layer.formula is not None:
        _, added, _ = _settle(layer.statistic, *settings)
        return layer.formula(x, weight, bias, len(sizes), added, centred)  # type: ignore[no-any-return]
    if reductions.is_eager(x):
        key = (kind, layer.p, x.device.type, dispatch.requested_backend())
        kernel, constant, added = _choose(*settings, *key)
        y = kernel and kernel(x, weight, bias, len(sizes), constant, added, centred)
        if y is not None:
            return y
    constant, added, dtype = _settle(layer.statistic, *settings)
    arguments = (weight, bias, len(sizes), layer.p, constant, added, dtype, centred)
    if reductions.is_transformed():
        return plain_layer_norm(x, *arguments)
    if reductions.is_half(dtype):
        return apply_without_autocast(LayerNormFunction, x, *arguments)  # type: ignore[no-any-return]
    return LayerNormFunction.apply(x, *arguments)  # type: ignore[no-any-return]


def _settle(
    statistic: statistics.PowerMean, convention: Constant | float, sizes: tuple[int, ...],
    eps: float | None, dtype: torch.dtype, stats_dtype: torch.dtype | None,
) -> tuple[float, float, torch.dtype]:  # fmt: skip
    """Return c, eps, and the dtype of accumulation."""
    if eps is None:
        eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    constant = statistic.constant(math.prod(sizes), convention)
    return constant, eps, batch_norm_base.accumulation_dtype(dtype, stats_dtype)


@dispatch.remember_choice
def _choose(*arguments: Any) -> tuple[LayerNorm | None, float, float]:
    """Return the kernel for the settings, kind, p, device and what is requested; c; eps."""
    *settings, kind, p, device, _ = arguments
    statistic = statistics.PowerMean(p)
    constant, eps, dtype = _settle(statistic, *settings)
    key = DispatchKey(kind, statistic, device, settings[3], dtype, "NCHW")
    return dispatch.select_backend(key).kernels, constant, eps


class LayerNormFunction(torch.autograd.Function):
    """Normalise (*, *normalized_shape) over the last `rank` dimensions, in `dtype`; y is like x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rank: int,
        p: float,
        constant: float,
        eps: float,
        dtype: torch.dtype,
        centred: bool,
    ) -> Tensor:
        dims = tuple(range(-rank, 0))
        wide = x.to(dtype)
        share = reductions.Share(x.shape[-rank:].numel())
        column = (*x.shape[:-rank], *[1] * rank)
        mean = reductions.share_mean(wide, dims, None)[0].view(column) if centred else None
        deviations = wide if mean is None else wide - mean
        magnitude = statistics.power_mean(deviations, p, dims, share).view(column)
        scale = magnitude * constant
        bounded = statistics.is_bounded(scale)
        if bounded is False:
            settings = (rank, p, constant, eps, torch.float64, centred)
            return LayerNormFunction.forward(ctx, x, weight, bias, *settings)
        total = statistics.total_scale(scale, eps, bounded)
        ctx.save_for_backward(x, weight, mean, magnitude, total)
        ctx.dims, ctx.p, ctx.constant = dims, p, constant
        ctx.plain = (rank, p, constant, eps, torch.promote_types(dtype, torch.float32), centred)
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        y = _give_weight_and_bias(deviations / total, weight, bias)
        # Dynamo of torch 2.11 loses the gradients of a result that an operation in place returned,
        # or a cast that left it as it was.
        return y if dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    @differentiable(plain_layer_norm)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, magnitude, total = ctx.saved_tensors
        dims, lead = ctx.dims, tuple(range(x.dim() - len(ctx.dims)))
        share = reductions.Share(x.shape[-len(dims) :].numel())
        dtype = magnitude.dtype
        wide, wide_grad = x.to(dtype), grad.to(dtype)
        scale = magnitude * ctx.constant
        # 0 − x and not −x: what copysign makes of a 0 is to be the same for both norms.
        reflected = 0 - wide if mean is None else mean - wide
        slope = statistics.power_mean_slope(reflected, magnitude, ctx.p)
        product = reflected.div_(-total).mul_(wide_grad)  # that is g · x̂
        grad_weight = grad_bias = None
        if weight is None:
            inner, along = wide_grad, product
        else:
            wide_weight = weight.to(dtype)
            grad_weight = _sum_leading(product, lead).to(weight.dtype)
            inner, along = wide_grad * wide_weight, product.mul_(wide_weight)
        if ctx.bias is not None:
            grad_bias = _sum_leading(wide_grad, lead).to(ctx.bias[1])
        pull = ctx.constant * (scale / total) * _mean(along, dims, share)
        grad_x = slope.mul_(pull).add_(inner)
        if mean is not None:
            grad_x = grad_x.sub_(_mean(grad_x, dims, share))
        return grad_x.div_(total).to(x.dtype), grad_weight, grad_bias, *(None,) * 6


def _give_weight_and_bias(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return y · weight + bias, of those that there are, in the dtype of y."""
    if weight is None:
        return y if bias is None else y + bias.to(y.dtype)
    if bias is None:
        return y * weight.to(y.dtype)
    return torch.addcmul(bias.to(y.dtype), y, weight.to(y.dtype))


def _mean(values: Tensor, dims: tuple[int, ...], share: reductions.Share) -> Tensor:
    mean = reductions.mean_of(values, dims, share)
    return mean.view(*mean.shape, *[1] * len(dims))


def _sum_leading(values: Tensor, lead: tuple[int, ...]) -> Tensor:
    return reductions.sum_of(values, lead) if lead else values.clone()


class FeatureNorm(nn.Module):
    """What layer and RMS norms by a power mean share."""

    kind: ClassVar[NormKind]
    formula: ClassVar[Callable[..., Tensor] | None] = None  # another than that of the power mean
    normalized_shape: tuple[int, ...]

    __prepare_scriptable__ = refuse_scripting
    named_modules: Any = named_modules_in_encoder

    def _set_statistic(
        self, p: float, constant: Constant | float, stats_dtype: torch.dtype | str | None
    ) -> None:
        self.p = check_power(p)
        self.statistic = statistics.PowerMean(self.p)
        self.constant = check_constant(constant)
        self.stats_dtype = batch_norm_base.check_stats_dtype(stats_dtype)

    def backend_for(self, input: Tensor) -> Dispatch:
        """Return the backend that computes such an input, and why, without running."""
        dtype = batch_norm_base.accumulation_dtype(input.dtype, self.stats_dtype)
        return dispatch.select_backend_for(input, self.kind, self.statistic, dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        batch_norm_base.note_norm(self, destination, prefix)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a layer, also one that was pickled before layers kept their statistic."""
        state = {"statistic": statistics.PowerMean(state["p"]), **state}
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Return the arguments, so that the repr evaluates."""
        return batch_norm_base.describe_settings(self, str(tuple(self.normalized_shape)))


class FeatureLayerNorm(FeatureNorm, nn.LayerNorm):
    """A layer norm by a power mean, or by another formula."""

    kind = "layer"

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float, elementwise_affine: bool,
        bias: bool, device: torch.device | str | None, dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        super().__init__(
            check_normalized_shape(normalized_shape),
            batch_norm_base.check_eps(eps),
            check_flag("elementwise_affine", elementwise_affine),
            bias=check_flag("bias", bias),
            device=device,
            dtype=dtype,
        )

    @traceable
    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised input, in its dtype."""
        settings = (self.normalized_shape, self.eps)
        return normalise_features(input, self, self.weight, self.bias, *settings, centred=True)


class FeatureRMSNorm(FeatureNorm, nn.RMSNorm):
    """An RMS norm by a power mean, or by another formula."""

    kind = "rms"

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float | None, elementwise_affine: bool,
        device: torch.device | str | None, dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        super().__init__(
            check_normalized_shape(normalized_shape),
            None if eps is None else batch_norm_base.check_eps(eps),
            check_flag("elementwise_affine", elementwise_affine),
            device=device,
            dtype=dtype,
        )

    @traceable
    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised input, in its dtype."""
        settings = (self.normalized_shape, self.eps)
        return normalise_features(x, self, self.weight, None, *settings, centred=False)


class LpLayerNorm(FeatureLayerNorm):
    """Layer norm that divides by ŝ = c(p) · (mean |x − μ|^p)^(1/p), p ≥ 1.

        y = (x − μ) / √(ŝ² + eps) · weight + bias

    μ and ŝ are taken over the last dimensions, those of `normalized_shape`, in `stats_dtype`.
    p = 2 is torch's own layer norm.

    Args:
        normalized_shape: sizes of the last dimensions, or the size of the last one.
        eps: added to the variance ŝ².
        elementwise_affine: learn a weight for each feature.
        bias: learn a bias for each feature too.
        p: the power, at least 1.
        constant: c. "exact" and "paper" are the Gaussian's, √(π/2) for p = 1; "none" is 1; a
            number is c itself.
        stats_dtype: dtype of accumulation: `torch.float32` or `torch.float64`; by default float32,
            and float64 for float64 inputs. Or `torch.float16` or `torch.bfloat16`: then all is
            computed in that dtype, whatever the input's (pure half).

    Raises:
        InputError: a setting outside what is allowed; an input that ends in other sizes.

    Examples:
        >>> LpLayerNorm(8, p=1.5)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])

    Source: Hoffer et al. 2018, §4 (arXiv 1803.01814).
    """

    @given_by_keyword("p")
    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float = 1e-5,
        elementwise_affine: bool = True, bias: bool = True, *, p: float = 1.0,
        constant: Constant | float = "exact", stats_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self._set_statistic(p, constant, stats_dtype)


class L1LayerNorm(LpLayerNorm):
    """Layer norm by ŝ = √(π/2) · mean |x − μ|; see `LpLayerNorm`, without its p.

    Examples:
        >>> L1LayerNorm(8)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float = 1e-5,
        elementwise_affine: bool = True, bias: bool = True, *, constant: Constant | float = "exact",
        stats_dtype: torch.dtype | str | None = None, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            normalized_shape, eps=eps, elementwise_affine=elementwise_affine, bias=bias,
            constant=constant, stats_dtype=stats_dtype, device=device, dtype=dtype,
        )  # fmt: skip


class LpRMSNorm(FeatureRMSNorm):
    """RMS norm that divides by ŝ = c(p) · (mean |x|^p)^(1/p), p ≥ 1, and does not centre.

        y = x / √(ŝ² + eps) · weight

    ŝ is taken over the last dimensions, those of `normalized_shape`, in `stats_dtype`. p = 2 is
    torch's own RMS norm. The slope of |x| at 0 is −1.

    Args:
        normalized_shape: sizes of the last dimensions, or the size of the last one.
        eps: added to ŝ². None is torch's: what float32 has between 1 and the next number, 1.2e-7,
            and for float64 inputs 2.2e-16.
        elementwise_affine: learn a weight for each feature.
        p: the power, at least 1.
        constant: c. "exact" and "paper" make ŝ the standard deviation of Gaussian x of mean 0,
            √(π/2) for p = 1; "none" is 1; a number is c itself.
        stats_dtype: as in `LpLayerNorm`.

    Raises:
        InputError: a setting outside what is allowed; an input that ends in other sizes.

    Examples:
        >>> LpRMSNorm(8, p=1.5)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])

    Source: Zhang & Sennrich 2019 (arXiv 1910.07467), with the statistics of Hoffer et al. 2018, §4
    (arXiv 1803.01814).
    """

    @given_by_keyword("p")
    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float | None = None,
        elementwise_affine: bool = True, *, p: float = 1.0, constant: Constant | float = "exact",
        stats_dtype: torch.dtype | str | None = None, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self._set_statistic(p, constant, stats_dtype)


class L1RMSNorm(LpRMSNorm):
    """RMS norm by ŝ = √(π/2) · mean |x|; see `LpRMSNorm`, without its p.

    Examples:
        >>> L1RMSNorm(8)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float | None = None,
        elementwise_affine: bool = True, *, constant: Constant | float = "exact",
        stats_dtype: torch.dtype | str | None = None, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            normalized_shape, eps=eps, elementwise_affine=elementwise_affine,
            constant=constant, stats_dtype=stats_dtype, device=device, dtype=dtype,
        )  # fmt: skip
