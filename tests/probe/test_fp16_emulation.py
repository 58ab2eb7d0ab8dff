from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nmlightning.norms.registry import layer_class
from nmlightning.probe.fp16_emulation import (
    HALF_NORMS,
    OUTCOMES,
    Fp16Limits,
    fp16_limits,
    run_in_fp16,
)

N = 4096
OTHERS = ("l1", "linf", "top10", "range")


def gaussian(sigmas: Sequence[float], mean: float = 0.0) -> Tensor:
    """Return a row of N Gaussian values for each σ."""
    return torch.randn(len(sigmas), N) * torch.tensor(sigmas).unsqueeze(1) + mean


def judge(rows: Tensor, gradients: Tensor | None, eps: float = 1e-5) -> dict[str, list[str]]:
    """Return what becomes of each row, by the name of the norm."""
    tried = run_in_fp16(rows, gradients, eps, tuple(HALF_NORMS))
    return {norm: [OUTCOMES[i] for i in outcome.tolist()] for norm, outcome in tried.items()}


def test_run_in_fp16_judges_each_channel() -> None:
    sigmas = [300.0, 1.0, 0.01, 1e-3, 10.0, 80.0, 0.02, 0.05, 1e4, 1e5]
    expected = {300.0: "dead", 80.0: "dead", 1e4: "dead", 1e5: "input"} | dict.fromkeys(
        (0.01, 1e-3, 0.02), "gradient not finite"
    )
    found = judge(gaussian(sigmas), torch.randn(len(sigmas), N) * 1e-4)
    assert found["half_l2"] == [expected.get(sigma, "right") for sigma in sigmas]
    for norm in OTHERS:
        assert found[norm] == ["right"] * 9 + ["input"], norm


@pytest.mark.parametrize("sigma", [1e-4, 1e-3, 0.02, 0.1, 1, 10, 60, 80, 1e3, 1e4])
def test_run_in_fp16_with_small_eps(sigma: float) -> None:
    """With eps = 1e-10 nothing hides small σ, and L1 is right from 1e-4 to 1e4."""
    found = judge(gaussian([sigma] * 8), torch.randn(8, N), eps=1e-10)
    l2_is_right = {outcome == "right" for outcome in found["half_l2"]}
    assert l2_is_right == (
        {True} if 0.1 <= sigma <= 10 else {False, True} if sigma == 60 else {False}
    )
    for norm in OTHERS:
        assert set(found[norm]) == {"right"}, norm


def test_fp16_limits_predict_the_outcomes() -> None:
    """Apart from σ at the very limit, where rounding and the gradient decide."""
    sigmas = torch.logspace(-4, 4, 200)
    rows = gaussian(sigmas.tolist())
    limits = fp16_limits("half_l2", 1e-5)
    deviations = rows.half() - rows.half().mean(1, keepdim=True)
    too_large = deviations.abs().amax(1) > limits.largest_deviation
    scales = rows.std(1)
    too_small = scales < limits.smallest_scale
    clear = (scales / limits.smallest_scale).log().abs() > 0.2
    lost = torch.tensor([o != "right" for o in judge(rows, torch.randn_like(rows))["half_l2"]])
    assert torch.equal(lost[clear], (too_large | too_small)[clear])
    assert clear.sum() > 190
    assert too_large.any()
    assert too_small.any()


def test_run_in_fp16_ignores_the_loss_scale() -> None:
    rows = gaussian([1e-3, 0.1, 1.0, 100.0])
    gradients = torch.randn_like(rows)
    assert judge(rows, gradients * 1e-30) == judge(rows, gradients) == judge(rows, gradients * 1e9)


def test_run_in_fp16_without_gradients() -> None:
    assert judge(gaussian([0.01, 1.0, 300.0]), None)["half_l2"] == ["right", "right", "dead"]


def test_run_in_fp16_of_a_constant_channel() -> None:
    found = judge(torch.full((1, N), 3.0), torch.randn(1, N))
    assert found == {"half_l2": ["gradient not finite"], **{key: ["right"] for key in OTHERS}}


@pytest.mark.parametrize(
    "rows",
    [
        gaussian([0.1], mean=1000.0),  # float16 has steps of 0.5 there
        gaussian([1.0], mean=1e5),
        gaussian([1e5]),
        torch.full((1, N), float("nan")),
        torch.full((1, N), float("inf")),
    ],
    ids=["mean", "offset", "large", "nan", "inf"],
)
def test_run_in_fp16_of_inputs_float16_cannot_hold(rows: Tensor) -> None:
    found = judge(rows, torch.randn_like(rows))
    assert found == {key: ["input"] for key in HALF_NORMS}


def test_run_in_fp16_ignores_infinite_gradients() -> None:
    found = judge(gaussian([1.0]), torch.full((1, N), float("inf")))
    assert found == {key: ["right"] for key in HALF_NORMS}


def test_run_in_fp16_leaves_out_norms_of_too_many_values() -> None:
    assert set(judge(torch.randn(2, 9), torch.randn(2, 9))) == {"half_l2", "l1", "linf"}


def test_run_in_fp16_joins_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = gaussian([1.0, 300.0] * 5)
    whole = judge(rows, rows)
    monkeypatch.setattr("nmlightning.probe.fp16_emulation._ELEMENTS_AT_ONCE", 3 * N)
    assert judge(rows, rows) == whole


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_layers_in_half_fail_as_emulated(dims: int) -> None:
    """The layers in half, on a whole batch with its own gradient, fail in the same channels."""
    sigmas = torch.logspace(-3, 4, 24)
    shape = {1: (64, 24, 64), 2: (16, 24, 16, 16), 3: (8, 24, 8, 8, 8)}[dims]
    x = torch.randn(shape) * sigmas.view(1, -1, *(1,) * dims)
    gradient = torch.randn(shape) * 1e-2
    rows, slopes = (tensor.transpose(0, 1).flatten(1) for tensor in (x, gradient))
    found = judge(rows, slopes)
    for name, options in (("half_l2", {}), ("l1", {"stats_dtype": torch.float16})):
        leaf = x.half().requires_grad_()
        output = layer_class(name, "batch", dims)(24, **options)(leaf)
        (got,) = torch.autograd.grad(output, leaf, gradient.half())
        over = (0, *range(2, dims + 2))
        failed = (output == 0).all(dim=over) | ~got.isfinite().all(dim=over)
        assert failed.tolist() == [outcome != "right" for outcome in found[name]], name


def test_run_in_fp16_allows_ties() -> None:
    """In float16 4 and −4 are equally far from the mean of 0.0003, and the first is taken."""
    row = torch.randn(1, 256)
    row[0, :2] = torch.tensor([4.0, -4.0])
    row[0, 2:] -= row[0, 2:].mean() - 0.0003
    assert judge(row, row)["linf"] == ["right"]


@pytest.mark.parametrize(
    ("options", "outcome"), [({}, "gradient wrong"), ({"constant": 1.2}, "wrong")]
)
def test_run_in_fp16_finds_wrong_outputs_and_gradients(
    options: dict[str, Any], outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged by L2, L1 has the right output and another gradient."""
    taken_for_l2 = replace(HALF_NORMS["l1"], exact=("lp", {"p": 2.0, **options}))
    monkeypatch.setattr("nmlightning.probe.fp16_emulation.HALF_NORMS", {"l1": taken_for_l2})
    row = gaussian([1.0])
    (outcomes,) = run_in_fp16(row, row, 1e-5, ["l1"]).values()
    assert OUTCOMES[int(outcomes[0])] == outcome


def halves_around(value: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the neighbours in float16 below and above a value."""
    halves = torch.arange(2**15, dtype=torch.int16).view(torch.float16)  # all that are not negative
    finite = halves[halves.isfinite()].sort().values
    below = finite.double() <= value
    return finite[below].max(), finite[~below].min()


def test_fp16_limits_largest_deviation_is_where_squares_overflow() -> None:
    below, above = halves_around(fp16_limits("half_l2", 1e-5).largest_deviation)
    assert (below * below).isfinite()
    assert (above * above).isinf()


@pytest.mark.parametrize("eps", [0.0, 1e-10, 1e-5, 1e-4])
def test_fp16_limits_smallest_scale_is_where_inverse_roots_overflow(eps: float) -> None:
    variance = fp16_limits("half_l2", eps).smallest_scale ** 2
    below, above = halves_around(variance + eps)
    assert below.pow(-1.5).isinf()
    assert above.pow(-1.5).isfinite()


def test_fp16_limits_with_a_large_eps() -> None:
    assert fp16_limits("half_l2", 1e-3).smallest_scale == 0.0


@pytest.mark.parametrize("norm", ["l1", "linf", "top10"])
def test_fp16_limits_of_other_norms_are_float16s(norm: str) -> None:
    info = torch.finfo(torch.float16)
    assert fp16_limits(norm, 1e-5) == Fp16Limits(info.smallest_normal, info.max)
