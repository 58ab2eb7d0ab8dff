"""What a norm whose every value is held in float16 can take, by the formula of each.

float16 holds magnitudes up to 65504, in steps of 2⁻²⁴ below 2⁻¹⁴ and of about a 2048th above. With
σ the deviation of a channel and d = x − μ, its limits meet the textbook form of L2 in two places:

- forward, d² is rounded to infinity from |d| = √65520 = 255.97 on. The variance is then infinite,
  its inverse root 0, and the channel's whole output 0, without any NaN.
- backward, autograd takes (σ² + eps)^(−3/2), which is infinite below σ = √(65520^(−2/3) − eps):
  0.0246 at eps = 1e-5. Infinity times what is 0 in float16 is NaN.

L1, L∞, Top(k) and range divide by what is as large as d itself, so for them the limits are those of
d: at most 65504, and no less than 2⁻¹⁴ = 6.1e-5 for a full mantissa.
"""

import math
from dataclasses import dataclass

LARGEST = 65504.0
SMALLEST_NORMAL = 2.0**-14
_ROUNDED_TO_INFINITY = 65520.0  # half a step above the largest
OF_SQUARES = ("l2", "half_l2")


@dataclass(frozen=True)
class HalfRange:
    """The deviations of a channel that a norm can take in float16.

    Attributes:
        smallest_scale: of σ, a lower bound.
        largest_deviation: of max |x − μ|, an upper bound.
    """

    smallest_scale: float
    largest_deviation: float


def half_range(norm: str, eps: float) -> HalfRange:
    """Return the limits of a norm, called as in a swap, whose statistics are in float16.

    Example:
        >>> half_range("half_l2", eps=0.0)
        HalfRange(smallest_scale=0.024805..., largest_deviation=255.96...)
    """
    if norm not in OF_SQUARES:
        return HalfRange(SMALLEST_NORMAL, LARGEST)
    smallest_variance = _ROUNDED_TO_INFINITY ** (-2 / 3) - eps
    return HalfRange(math.sqrt(max(smallest_variance, 0.0)), math.sqrt(_ROUNDED_TO_INFINITY))
