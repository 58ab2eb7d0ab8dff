"""Noise as coarse quantisation makes it, to see what a network and its norms bear."""

import math

import torch
from torch import Tensor, nn

from nmlightning.errors import InputError, is_number


class QuantizationNoise(nn.Module):
    """Adds Gaussian noise whose standard deviation is a given part of its input's.

        y = x + r · σ · z,   z ~ N(0, 1)

    σ is the standard deviation of the whole tensor, taken in float32 or wider; the noise has no
    gradient, so that of x passes as it is. It is added in training and in evaluation, since a
    quantised network rounds in both. (B, *) in, the same out. Uniform quantisation to b bits over
    ±a·σ has r = a / (√3 · 2^b), 0.007 for b = 8 and a = 3. Non-finite inputs make all of y so.

    Args:
        ratio: r, at least 0; 0 adds nothing.

    Raises:
        InputError: a ratio that is negative, not finite or no number.

    Example:
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
