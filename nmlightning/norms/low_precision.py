"""Layers that show what low precision does: L2 batch norm op by op in float16, additive noise."""

import math

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from nmlightning.errors import InputError, is_number
from nmlightning.functional.statistics import channel_shape, reduced_dims
from nmlightning.norms.batch_norm_base import BatchNormBase, accumulation_dtype, activate


class HalfL2BatchNorm(BatchNormBase):
    """Batch norm by the standard deviation, op by op in float16, differentiated by autograd.

        y = (x − μ) · (var + eps)^(−½) · weight + bias,   var = mean (x − μ)²

    Each result is rounded to float16, whatever the input's dtype; only the means accumulate in
    float32. It shows failures that `LpBatchNorm(p=2, stats_dtype=torch.float16)` avoids, by
    divisions and an analytic gradient, and torch's own batch norm by float32:

    - (x − μ)² overflows where |x − μ| > 255.9, and makes the channel's output 0, without a NaN:
      from σ = 60 on, for some channels of 4096 values;
    - (var + eps)^(−3/2), a factor of the gradient, overflows where σ < 0.0246, and makes it
      infinite or NaN.

    (N, C, *) in, the same out. Evaluation is torch's batch norm. Use a subclass for a fixed number
    of dimensions. Arguments that are not listed are those of `StatisticBatchNorm`.

    Args:
        num_features: C.
        eps: added to the variance; below 3e-8 it is 0 in float16.
        sync: must be False where several ranks train; it does not share its statistics.

    Raises:
        InputError: a setting outside what is allowed; another number of channels than C; in
            training on several ranks with `sync`.
        ValueError: one value per channel in training, as torch does.

    Source: Hoffer et al. 2018 (arXiv 1803.01814), their "L2 BN (FP16 precision + FP32
    accumulator)".
    """

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1,
        affine: bool = True, track_running_stats: bool = True, *, bias: bool = True,
        sync: bool = False, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            num_features, eps=eps, momentum=momentum, affine=affine, bias=bias,
            track_running_stats=track_running_stats, stats_dtype=torch.float16,
            sync=sync, device=device, dtype=dtype,
        )  # fmt: skip

    @torch._disable_dynamo  # type: ignore[attr-defined, untyped-decorator, unused-ignore]  # it would not round
    def _normalise(
        self, input: Tensor, residual: Tensor | None, group: ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if group is not None:
            raise InputError(
                f"{type(self).__name__} cannot share its statistics among ranks: set its sync, "
                "and the Trainer's sync_batchnorm, to False."
            )
        dims, shape = reduced_dims(input), channel_shape(input)
        with torch.autocast(input.device.type, enabled=False):
            half = input.to(accumulation_dtype(input.dtype, self.stats_dtype))
            mean = half.mean(dims)
            deviations = half - mean.view(shape)
            variance = deviations.square().mean(dims)
            y = deviations * (variance + self.eps).pow(-0.5).view(shape)
            y = y if self.weight is None else y * self.weight.half().view(shape)
            y = y if self.bias is None else y + self.bias.half().view(shape)
        count = input.numel() // input.shape[1]
        unbiased = variance.detach().float() * count / (count - 1)
        output = activate(y.to(input.dtype), residual, self.fused)
        return output, mean.detach().float(), unbiased


class HalfL2BatchNorm1d(HalfL2BatchNorm, nn.BatchNorm1d):
    """`HalfL2BatchNorm` of (N, C) or (N, C, L) inputs."""


class HalfL2BatchNorm2d(HalfL2BatchNorm, nn.BatchNorm2d):
    """`HalfL2BatchNorm` of (N, C, H, W) inputs.

    Examples:
        >>> HalfL2BatchNorm2d(16)(torch.randn(8, 16, 4, 4)).shape
        torch.Size([8, 16, 4, 4])
    """


class HalfL2BatchNorm3d(HalfL2BatchNorm, nn.BatchNorm3d):
    """`HalfL2BatchNorm` of (N, C, D, H, W) inputs."""


class QuantizationNoise(nn.Module):
    """Adds Gaussian noise whose standard deviation is a given part of its input's.

        y = x + r · σ · z,   z ~ N(0, 1)

    σ is the standard deviation of the whole tensor, taken in float32 or wider; the noise has no
    gradient, so that of x passes unchanged. It is added in training and in evaluation, since a
    quantised network rounds in both. (B, *) in, the same out. Uniform quantisation to b bits over
    ±a·σ has r = a / (√3 · 2^b), 0.007 for b = 8 and a = 3. Non-finite inputs make all of y so.

    Args:
        ratio: r, at least 0; 0 adds nothing.

    Raises:
        InputError: a ratio that is negative, not finite or no number.

    Examples:
        >>> noisy = nn.Sequential(nn.Conv2d(3, 8, 3), QuantizationNoise(0.1), nn.BatchNorm2d(8))
        >>> noisy(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 8, 6, 6])

    Source: Hoffer et al. 2018 (arXiv 1803.01814); Banner et al. 2018 (arXiv 1805.11046).
    """

    def __init__(self, ratio: float) -> None:
        super().__init__()
        if not (is_number(ratio) and 0 <= ratio < math.inf):
            raise InputError(f"ratio must be finite and at least 0, got {ratio!r}.")
        self.ratio = float(ratio)

    def forward(self, input: Tensor) -> Tensor:
        """Return the input with fresh noise, in its dtype."""
        if self.ratio == 0 or input.numel() < 2:
            return input
        with torch.no_grad():
            wide = torch.promote_types(input.dtype, torch.float32)
            deviation = self.ratio * input.to(wide).std(correction=0)
            noise = (torch.randn_like(input, dtype=wide) * deviation).to(input.dtype)
        return input + noise

    def extra_repr(self) -> str:
        """Return the ratio, so that the repr evaluates."""
        return str(self.ratio)
