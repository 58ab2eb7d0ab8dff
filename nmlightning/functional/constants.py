"""Expected values of scale statistics of Gaussian samples, and the constants that correct them.

A norm layer divides by ŝ = c · statistic(x − μ). With c = 1 / E[statistic of n standard normals],
ŝ estimates the standard deviation of normal data, whichever statistic was chosen.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

from nmlightning.errors import InputError, check_whole_number, is_number, nearest

Constant = Literal["exact", "paper", "official", "none"]
CONSTANTS: tuple[Constant, ...] = ("exact", "paper", "official", "none")
STATISTICS = ("l1", "l2", "lp", "linf", "topk", "range")

# The integrands below fall from 1 to 0 over a width of about 1/sqrt(2 ln n) ≥ 0.17 and are zero to
# rounding at 9 standard deviations for n ≤ 10⁷, so 450 Simpson panels leave an error below 1e-6.
_TAIL = 9.0
_PANELS = 450
# Above this k the mean of the k largest is the truncated mean of the distribution to within 0.1 %.
_LARGE_K = 512
# What 1/√(2 ln n) is multiplied by: for L∞ in the paper, for the range in its authors' code.
_MAXIMUM_FACTOR = 0.5 * (1 + math.sqrt(math.pi * math.log(4)))
_OFFICIAL_RANGE_FACTOR = 0.35 * _MAXIMUM_FACTOR


def gaussian_constant(
    statistic: str, n: int, *, p: float = 1.0, k: int = 10, constant: Constant | float = "exact"
) -> float:
    """Return c such that ŝ = c · statistic estimates the standard deviation of normal samples.

    | statistic | value on deviations d | c ("exact") |
    |---|---|---|
    | `l2`, `l1`, `lp` | (mean |d|^p)^(1/p) | (√π / (2^(p/2) Γ((p+1)/2)))^(1/p), whatever n |
    | `linf` | max |d| | 1 / E[max of n |z|] |
    | `topk` | mean of the k largest |d| | 1 / E[mean of the k largest of n |z|] |
    | `range` | max d − min d | 1 / E[max − min of n z] |

    z are n independent standard normals. `"paper"` gives the closed form of the paper for `linf`
    and for every k of `topk`, ½ (1 + √(π ln 4)) / √(2 ln n), which overestimates σ by up to 47 %,
    and for `range` the 1 / √(2 ln n) of Banner et al., which overestimates it by about 80 % and no
    published run used: their code has 0.5402 / √(2 ln n), which is within 12 % and what
    `"official"` gives; for the others that is `"paper"`. `"none"` gives 1; a number is returned.
    "exact" is that of n independent values for L∞, Top(k) and the range, within 0.1 % for
    2 ≤ n ≤ 10⁷, and that of n → ∞ for Lp, as √(mean d²) is for L2: at p = 4 the output's deviation
    is 1.2 % above 1 at n = 64, at p = 10 it is 10 %.

    Args:
        statistic: one of `l1`, `l2`, `lp`, `linf`, `topk`, `range`.
        n: number of samples that the statistic is taken over, for `range` those of one chunk; at
            least 2 for `range`, and for `linf` and `topk` with the paper's constant.
        p: the power, for `lp` only.
        k: how many of the largest, for `topk` only; at most n.
        constant: the convention, or the constant itself.

    Raises:
        InputError: an unknown statistic or convention, n < 1, p < 1, k < 1 or k > n.

    Examples:
        >>> round(gaussian_constant("l1", 100), 4)
        1.2533
        >>> round(gaussian_constant("topk", 1000, k=10), 3)
        0.348

    Source: Hoffer et al. 2018, §4 (arXiv 1803.01814), and Banner et al. 2018 (arXiv
    1805.11046) for the range; order statistics by quadrature.
    """
    _check_arguments(statistic, n, p, k)
    constant = check_constant(constant)
    if isinstance(constant, float):
        return constant
    if constant == "none":
        return 1.0
    if statistic in ("l1", "l2", "lp"):
        return power_mean_constant({"l1": 1.0, "l2": 2.0}.get(statistic, p))
    if statistic == "range":
        return range_constant(n, constant)
    return top_k_constant(n, 1 if statistic == "linf" else k, constant)


def power_mean_constant(p: float) -> float:
    """Return 1 / (E|z|^p)^(1/p) for a standard normal z: √(π/2) for p = 1, and 1 for p = 2."""
    return math.exp(-(p / 2 * math.log(2) + math.lgamma((p + 1) / 2) - math.log(math.pi) / 2) / p)


def top_k_constant(n: int, k: int, constant: Constant) -> float:
    """Return the constant of the mean of the k largest of n, exact or as the paper has it."""
    if constant == "none":
        return 1.0
    if constant == "exact":
        return 1.0 / expected_top_k(n, k)
    if n < 2:
        raise InputError(f"The paper's constant divides by ln n and needs n ≥ 2, got n = {n}.")
    return _MAXIMUM_FACTOR / math.sqrt(2 * math.log(n))


@lru_cache(maxsize=4096)
def expected_top_k(n: int, k: int) -> float:
    """Return E[mean of the k largest of |z₁| … |zₙ|] for independent standard normals z.

    With N_t = #{i : |z_i| > t} ~ Binomial(n, erfc(t/√2)), it is (1/k) ∫₀^∞ E[min(N_t, k)] dt.
    """
    if k > _LARGE_K:
        return _truncated_mean(k / n)
    return _integrate(lambda t: _mean_of_capped_count(n, k, t)) / k


def range_constant(n: int, constant: Constant) -> float:
    """Return the constant of the range of n values, exact or as Banner et al. print or use it."""
    if constant == "none":
        return 1.0
    if n < 2:
        raise InputError(f"The range of n = {n} value is 0: n must be at least 2.")
    if constant == "exact":
        return 1.0 / expected_range(n)
    factor = _OFFICIAL_RANGE_FACTOR if constant == "official" else 1.0
    return factor / math.sqrt(2 * math.log(n))


@lru_cache(maxsize=4096)
def expected_range(n: int) -> float:
    """Return E[max − min] of n independent standard normals: 2 ∫₀^∞ (1 − Φ(t)ⁿ − Φ(−t)ⁿ) dt."""

    def outside(t: float) -> float:
        above = math.erfc(t / math.sqrt(2)) / 2
        return -math.expm1(n * math.log1p(-above)) - above**n

    return 2 * _integrate(outside)


def _integrate(function: Callable[[float], float]) -> float:
    """Return the integral from 0 to ∞ by Simpson's rule."""
    h = _TAIL / _PANELS
    weights = (1.0 if i in (0, _PANELS) else 4.0 if i % 2 else 2.0 for i in range(_PANELS + 1))
    return math.fsum(w * function(i * h) for i, w in enumerate(weights)) * h / 3


def _mean_of_capped_count(n: int, k: int, t: float) -> float:
    """Return E[min(N, k)] for N ~ Binomial(n, q), q = P(|z| > t)."""
    q = math.erfc(t / math.sqrt(2))
    if t == 0.0:
        return float(min(n, k))
    log_q, log_rest = math.log(q), math.log1p(-q)
    log_n = math.lgamma(n + 1)
    missing = math.fsum(
        (k - i)
        * math.exp(
            log_n - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * log_q + (n - i) * log_rest
        )
        for i in range(min(k, n + 1))
    )
    return k - missing


def _truncated_mean(share: float) -> float:
    """Return E[|z| given that |z| is among the largest `share`] = 2 φ(t) / share."""
    normal = NormalDist()
    return 2 * normal.pdf(normal.inv_cdf(share / 2)) / share


def check_constant(constant: Constant | float) -> Constant | float:
    """Return `constant`, a convention or a finite number above 0, or raise InputError."""
    if isinstance(constant, str):
        if constant not in CONSTANTS:
            raise InputError(
                f"constant is {', '.join(map(repr, CONSTANTS))} or a number above 0, "
                f"got {constant!r}.{nearest(constant, CONSTANTS)}"
            )
        return constant
    if not (is_number(constant) and 0 < constant < math.inf):
        raise InputError(f"constant must be a finite number above 0, got {constant!r}.")
    return float(constant)


def check_power(p: float) -> float:
    """Return p as a float if it is finite and at least 1, or raise InputError."""
    if not (is_number(p) and 1 <= p < math.inf):
        raise InputError(
            f"p must be finite and at least 1, got {p!r}; for the maximum use 'linf' "
            "(LInfBatchNorm)."
        )
    return float(p)


def _check_arguments(statistic: str, n: int, p: float, k: int) -> None:
    if statistic not in STATISTICS:
        raise InputError(
            f"statistic is one of {', '.join(STATISTICS)}, got {statistic!r}."
            f"{nearest(statistic, STATISTICS)}"
        )
    check_whole_number("n", n)
    check_power(p)
    check_whole_number("k", k)
    if statistic == "topk" and k > n:
        raise InputError(f"The {k} largest of n = {n} values do not exist: k must be at most n.")
