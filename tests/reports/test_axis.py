import numpy as np
import pytest

from nmlightning.reports.page import Axis


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 1.0], [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ([43.1, 52.4], [44, 46, 48, 50, 52]),
        ([-0.003, 0.004], [-0.002, 0, 0.002, 0.004]),
        ([5.0, 5.0], [4.6, 4.8, 5.0, 5.2, 5.4]),
        ([np.nan, np.inf], [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    ],
)
def test_linear_ticks(values: list[float], ticks: list[float]) -> None:
    assert Axis.over(np.array(values)).ticks() == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.5, 2e4], [1, 10, 100, 1000, 1e4]),
        ([1e-3, 1e9, 0.0, -1.0], [1e-3, 1, 1e3, 1e6, 1e9]),
        ([1e-9, 1e9], [1e-9, 1e-5, 1e-1, 1e3, 1e7]),
        ([0.02, 6.0], [0.03, 0.1, 0.3, 1, 3]),
        ([0.4, 6.0], [0.5, 1, 2, 5]),
        ([2.0, 3.0], [2.0, 2.2, 2.4, 2.6, 2.8, 3.0]),
        ([0.0], [1, 3, 10]),
    ],
)
def test_logarithmic_ticks(values: list[float], ticks: list[float]) -> None:
    assert Axis.over(np.array(values), logarithmic=True).ticks() == pytest.approx(ticks)


def test_shares() -> None:
    values = np.array([1.0, 10.0, 100.0, 0.0, -1.0, np.inf])
    logarithmic = Axis.over(values, logarithmic=True).shares(values)
    np.testing.assert_allclose(logarithmic, [0, 0.5, 1, np.nan, np.nan, np.nan], atol=1e-12)
    np.testing.assert_allclose(Axis.over(values[:3]).shares(values[:3]), [0, 1 / 11, 1])
