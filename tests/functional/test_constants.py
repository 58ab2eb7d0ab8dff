"""The constants against order statistics by another road, Monte Carlo, and the published table."""

import math

import numpy as np
import pytest
import torch
from scipy import special

from nmlightning.errors import InputError
from nmlightning.functional.constants import STATISTICS
from nmlightning.norms import gaussian_constant

# What is asked of the constants, and what the docstring claims beyond it.
PROMISED, CLAIMED = 5e-3, 1e-3
SIZES = (2, 3, 5, 10, 64, 100, 512, 513, 1_000, 100_000, 1_000_000, 10_000_000)
# Beyond 512 the code takes a limit.
COUNTS = (1, 2, 3, 10, 100, 512, 513, 600, 5_000, 100_000)
PAPER = {100: 0.50858, 1_000: 0.41525, 10_000: 0.35962, 100_000: 0.32165, 1_000_000: 0.29363}
LINF = {100: 0.36404, 1_000: 0.29109, 10_000: 0.24883, 100_000: 0.22059, 1_000_000: 0.20006}
TOP10 = {100: 0.48988, 1_000: 0.34781, 10_000: 0.28244, 100_000: 0.24334, 1_000_000: 0.21673}


def mean_beyond(share: np.ndarray) -> np.ndarray:
    """Return E[|z| given |z| > t] for a standard normal z and P(|z| > t) = share."""
    t = -special.ndtri(share / 2)
    return 2 * np.exp(-t * t / 2) / math.sqrt(2 * math.pi) / share


def expected_top_k(n: int, k: int) -> float:
    """Return E[mean of the k largest of n |z|], given the next largest.

    Above the (k+1)-th largest the k largest are independent draws from the tail, whose probability
    is Beta(k + 1, n − k) distributed; the mean over that is taken over its quantiles.
    """
    if k == n:
        return math.sqrt(2 / math.pi)
    nodes, weights = np.polynomial.legendre.leggauss(400)
    shares = special.betaincinv(k + 1, n - k, (nodes + 1) / 2)
    return float((weights / 2 * mean_beyond(shares)).sum())


def test_reference_agrees_with_monte_carlo() -> None:
    draws = torch.randn(400_000, 5, dtype=torch.float64).abs().sort(descending=True).values
    for k in (1, 2, 4):
        means = draws[:, :k].mean(1)
        error = means.std().item() / math.sqrt(len(means))
        assert means.mean().item() == pytest.approx(expected_top_k(5, k), abs=4 * error)


@pytest.mark.parametrize(("n", "k"), [(n, k) for n in SIZES for k in COUNTS if k <= n])
def test_topk_constant_equals_order_statistics(n: int, k: int) -> None:
    exact = 1 / expected_top_k(n, k)
    assert gaussian_constant("topk", n, k=k) == pytest.approx(exact, rel=CLAIMED)
    if k == 1:
        assert gaussian_constant("linf", n) == gaussian_constant("topk", n, k=1)


@pytest.mark.parametrize("n", [513, 1_000, 100_000, 10_000_000])
def test_topk_constant_is_continuous_at_the_limit(n: int) -> None:
    exact, limit = (gaussian_constant("topk", n, k=k) for k in (512, 513))
    assert limit == pytest.approx(exact, rel=2 * CLAIMED)


@pytest.mark.parametrize("n", PAPER)
def test_constants_equal_the_published_table(n: int) -> None:
    for statistic, ideal in {"linf": LINF, "topk": TOP10}.items():
        # The table's own "ideal" columns are good to the 0.45 % of the approximation behind them.
        assert gaussian_constant(statistic, n) == pytest.approx(ideal[n], rel=PROMISED)
        paper = gaussian_constant(statistic, n, constant="paper")
        assert paper == pytest.approx(PAPER[n], abs=5e-6)  # five digits


@pytest.mark.parametrize(("n", "deviation"), [(100, 1.12), (100_000, 1.01)])
def test_official_constant_is_of_the_range_only(n: int, deviation: float) -> None:
    official = gaussian_constant("range", n, constant="official")
    assert official == pytest.approx(0.5402 / math.sqrt(2 * math.log(n)), rel=1e-4)
    exact = gaussian_constant("range", n)
    assert exact / official == pytest.approx(deviation, abs=0.006)  # two decimals, rounded
    for statistic in ("l1", "linf", "topk"):
        published = gaussian_constant(statistic, n, constant="paper")
        assert gaussian_constant(statistic, n, constant="official") == published


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.7, 8.0, 60.0])
def test_lp_constant_equals_quadrature(p: float) -> None:
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    moment = (weights * np.abs(nodes) ** p).sum() / math.sqrt(2 * math.pi)
    # |z|^p has a kink at 0 for odd and fractional p, where 200 nodes are good to 1e-2 for p = 1.
    assert gaussian_constant("lp", 7, p=p) == pytest.approx(moment ** (-1 / p), rel=1e-2)
    assert gaussian_constant("lp", 7, p=p) == gaussian_constant("lp", 10_000, p=p)


def test_lp_constant_equals_closed_forms() -> None:
    assert gaussian_constant("l1", 9) == pytest.approx(math.sqrt(math.pi / 2), rel=1e-14)
    assert gaussian_constant("l2", 9) == pytest.approx(1, rel=1e-14)
    assert gaussian_constant("lp", 9, p=4) == pytest.approx(3**-0.25, rel=1e-14)
    assert gaussian_constant("l1", 9, p=4, constant="paper") == gaussian_constant("l1", 9)


@pytest.mark.parametrize("statistic", ["l1", "l2", "lp", "linf", "topk"])
def test_constant_takes_none_and_numbers(statistic: str) -> None:
    assert gaussian_constant(statistic, 50, constant="none") == 1
    assert gaussian_constant(statistic, 50, constant=0.25) == 0.25
    assert gaussian_constant(statistic, 50, constant=4) == 4


@pytest.mark.parametrize(
    ("statistic", "n", "options", "message"),
    [
        ("linff", 9, {}, rf"{', '.join(STATISTICS)}, got 'linff'\. Did you mean 'linf'\?"),
        ("l1", 0, {}, "n must be a whole number of at least 1, got 0"),
        ("l1", "9", {}, "n must be a whole number of at least 1, got '9'"),
        ("lp", 9, {"p": 0.5}, "p must be finite and at least 1, got 0.5"),
        ("lp", 9, {"p": math.inf}, "got inf; for the maximum use 'linf'"),
        ("lp", 9, {"p": math.nan}, "p must be finite and at least 1, got nan"),
        ("topk", 9, {"k": 0}, "k must be a whole number of at least 1, got 0"),
        ("topk", 9, {"k": 2.5}, "k must be a whole number of at least 1, got 2.5"),
        ("topk", 9, {"k": 10}, "The 10 largest of n = 9 values do not exist"),
        ("topk", 9, {"k": 3, "constant": "exakt"}, r"got 'exakt'\. Did you mean 'exact'\?"),
        ("l1", 9, {"constant": 0.0}, "a finite number above 0, got 0.0"),
        ("l1", 9, {"constant": -1}, "a finite number above 0, got -1"),
        ("l1", 9, {"constant": math.inf}, "a finite number above 0, got inf"),
        ("linf", 1, {"constant": "paper"}, "divides by ln n and needs n ≥ 2, got n = 1"),
    ],
)
def test_gaussian_constant_rejects_bad_input(
    statistic: str, n: int, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        gaussian_constant(statistic, n, **options)
