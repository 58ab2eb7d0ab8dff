import math

import pytest
import torch

from nmlightning.probe.fp16_emulation import Fp16Limits, fp16_limits


def halves_around(value: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the neighbours in float16 below and above a value."""
    halves = torch.arange(2**15, dtype=torch.int16).view(torch.float16)  # all that are not negative
    finite = halves[halves.isfinite()].sort().values
    below = finite.double() <= value
    return finite[below].max(), finite[~below].min()


def test_the_largest_deviation_is_where_the_square_overflows() -> None:
    below, above = halves_around(fp16_limits("half_l2", 1e-5).largest_deviation)
    assert (below * below).isfinite()
    assert (above * above).isinf()


@pytest.mark.parametrize("eps", [0.0, 1e-10, 1e-5, 1e-4])
def test_the_smallest_scale_is_where_the_inverse_root_overflows(eps: float) -> None:
    variance = fp16_limits("half_l2", eps).smallest_scale ** 2
    below, above = halves_around(variance + eps)
    assert below.pow(-1.5).isinf()
    assert above.pow(-1.5).isfinite()


def test_a_large_eps_leaves_l2_no_lower_limit() -> None:
    assert fp16_limits("half_l2", 1e-3).smallest_scale == 0.0


@pytest.mark.parametrize("norm", ["l1", "linf", "top10"])
def test_others_take_what_float16_holds(norm: str) -> None:
    info = torch.finfo(torch.float16)
    assert fp16_limits(norm, 1e-5) == Fp16Limits(info.smallest_normal, info.max)


def test_usable_decades() -> None:
    """They are 3.4 for L2 and 8.4 for L1, where max |d| of 4,096 Gaussian values is about 4.3 σ."""
    for norm, decades in (("half_l2", 3.4), ("l1", 8.4)):
        limits = fp16_limits(norm, 0.0)
        assert math.log10(limits.largest_deviation / 4.3 / limits.smallest_scale) == pytest.approx(
            decades, abs=0.05
        )
