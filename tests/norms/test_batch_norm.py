"""Batch norms against a naive definition: values, gradients, ties, constants, settings."""

import copy
import math
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batch_norm_contract import (
    DISTINCT,
    EXACT,
    NORMS,
    Norm,
    batch,
    check_compilation,
    define,
    every_layout,
    every_norm,
    every_statistic,
    gradients,
    learned,
    saved_bytes,
)
from nmlightning import norms
from nmlightning.errors import InputError


@every_norm
@every_layout
def test_output_and_gradients_equal_the_definition(norm: Norm, layout: str) -> None:
    x, dims = batch(layout)
    layer = norm.layer(dims=dims, dtype=torch.float64)
    x.requires_grad_()
    leaves = [x, *learned(layer)]
    expected, mean, scale = define(norm, x, layer.weight, layer.bias)
    found = layer(x)
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(gradients(found, leaves), gradients(expected, leaves), **EXACT)
    n = x.numel() // x.shape[1]
    torch.testing.assert_close(layer.running_mean, 0.1 * mean, **EXACT)
    start = 0.9 if norm.has_statistic else 0.9 * (1 - 1e-5)
    variance = norm.variance(scale, n)
    torch.testing.assert_close(layer.running_var, start + 0.1 * variance, **EXACT)
    assert layer.num_batches_tracked == 1


@every_statistic
@pytest.mark.parametrize("fused", [None, "relu"])
def test_second_derivatives_pass_gradgradcheck(norm: Norm, fused: Any) -> None:
    x = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    layer = norm.layer(dims=1, dtype=torch.float64)
    layer.fused = fused
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x).pow(3), (x, *learned(layer)))


@pytest.mark.parametrize("make", [norms.L1BatchNorm1d, norms.L1LayerNorm, norms.L1RMSNorm])
def test_second_derivatives_in_pure_half_are_those_of_float32(make: Any) -> None:
    x, found = torch.randn(12, 3, requires_grad=True), []
    for dtype in (None, "bfloat16"):
        loss = make(3, stats_dtype=dtype)(x).pow(3).sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        found += torch.autograd.grad(grad.square().sum(), x)
    error = (found[1] - found[0]).norm() / found[0].norm()
    assert error < 0.05  # y was rounded to bfloat16


def test_second_derivative_is_an_error_where_there_is_none() -> None:
    x = torch.randn(12, 3, requires_grad=True)
    y = norms.MeanOnlyBatchNorm1d(3, stats_dtype="bfloat16")(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    for derive in (torch.Tensor.backward, lambda loss: torch.autograd.grad(loss, x)):
        with pytest.raises(RuntimeError, match="can be differentiated once, and a second"):
            # x is used elsewhere too, so a gradient without the penalty's share would go unnoticed.
            derive(x.sum() + grad.square().sum())


@every_norm
def test_ties_give_the_gradient_to_the_first(norm: Norm) -> None:
    """Whole numbers around their exact mean 0 are nearly all ties: the first of them counts."""
    half = torch.randint(-2, 3, (6, 3, 2, 4)).double()
    for x in (torch.cat([half, -half]), torch.cat([half, -half], 3)):
        for arranged in (x, x.contiguous(memory_format=torch.channels_last)):
            leaf = arranged.requires_grad_()
            layer = norm.layer(dtype=torch.float64)
            expected = define(norm, leaf, layer.weight, layer.bias)[0]
            (found,) = gradients(layer(leaf), [leaf])
            torch.testing.assert_close(found, *gradients(expected, [leaf]), **EXACT)
            # The same in bfloat16, which holds these values exactly; one rounding of the gradient.
            low = arranged.detach().bfloat16().requires_grad_()
            low_layer = copy.deepcopy(layer).float()
            grad = gradients(low_layer(low).double(), [low])[0]
            torch.testing.assert_close(grad.double(), found, rtol=2**-8, atol=2**-6)


@every_norm
@pytest.mark.parametrize("missing", [["bias"], ["weight"], ["weight", "bias"]], ids=str)
def test_layer_works_without_weight_or_bias(norm: Norm, missing: list[str]) -> None:
    """A swap takes over the parameters of whatever layer it finds."""
    x = torch.randn(4, 3, 2, 5, dtype=torch.float64, requires_grad=True)
    layer = norm.layer(dtype=torch.float64)
    for name in missing:
        setattr(layer, name, None)
    leaves = [x, *learned(layer)]
    expected = define(norm, x, layer.weight, layer.bias)[0]
    torch.testing.assert_close(layer(x), expected, **EXACT)
    torch.testing.assert_close(gradients(layer(x), leaves), gradients(expected, leaves), **EXACT)


@every_norm
def test_layer_saves_no_more_than_torchs(norm: Norm) -> None:
    x = torch.randn(8, 64, 8, 8, requires_grad=True)
    selected = norm.k or 2 * (norm.chunks or 0)
    indices = 64 * selected * (8 + 4)  # An int64 position and a float32 slope each.
    theirs = saved_bytes(nn.BatchNorm2d(64), x) if norm.has_statistic else 0
    assert saved_bytes(norm.layer(64), x) <= theirs + indices


# Dynamo of torch 2.11 instantiates any autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "norm", [NORMS[n] for n in ("l1", "top10", "lp3.7", "range5", "mean")], ids=str
)
def test_layer_compiles_without_graph_breaks(norm: Norm) -> None:
    check_compilation(norm.layer(), 3, 2, 5)


SIZES = [(64, 20_000, 3e-2), (1_024, 8_000, 1e-2), (10_000, 1_000, 1e-2), (100_000, 200, 1e-2)]


@pytest.fixture(scope="module", params=SIZES, ids=str)
def gaussians(request: pytest.FixtureRequest) -> tuple[Tensor, float]:
    """N(3, 5²) of n values in many channels, and how far the output's std may be from 1.

    The maximum of n varies by 15 % … 6 %; over so many channels the mean is good to 0.2 %.
    """
    n, channels, tolerance = request.param
    generator = torch.Generator().manual_seed(n)
    length = 16 if n < 10_000 else 100
    return 5 * torch.randn(n // length, channels, length, generator=generator) + 3, tolerance


def mean_std(layer: nn.Module, x: Tensor) -> float:
    """Return the standard deviation of a channel's output, averaged over the channels."""
    with torch.no_grad():
        return layer(x).transpose(0, 1).flatten(1).std(1).mean().item()


@every_statistic
def test_exact_constant_gives_unit_std(norm: Norm, gaussians: tuple[Tensor, float]) -> None:
    x, tolerance = gaussians
    layer = norm.layer(x.shape[1], dims=1, affine=False)
    assert mean_std(layer, x) == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize(
    ("norm", "n", "std"),
    [("linf", 100, 0.72), ("linf", 10**5, 0.686), ("top10", 100, 0.963), ("top10", 10**4, 0.785)],
)
def test_paper_constant_gives_too_small_a_std(norm: str, n: int, std: float) -> None:
    """C(ideal)/C(paper), from the published table; 400 channels leave 0.3 … 0.8 % of noise."""
    x = torch.randn(n // 10, 400 if n < 100_000 else 100, 10)
    layer = NORMS[norm].layer(x.shape[1], dims=1, affine=False, constant="paper")
    assert mean_std(layer, x) == pytest.approx(std, rel=0.02)


@every_statistic
@pytest.mark.parametrize("constant", ["none", 0.25, 4])
def test_constant_scales_the_output(norm: Norm, constant: str | float) -> None:
    x = torch.randn(8, 3, 2, 2, dtype=torch.float64)
    exact = norm.layer(eps=0.0, affine=False)
    other = norm.layer(eps=0.0, affine=False, constant=constant)
    factor = norm.constant(32) / (1 if constant == "none" else constant)
    torch.testing.assert_close(other(x), exact(x) * factor, **EXACT)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"eps": 1e-3},
    {"momentum": None},
    {"momentum": 0.25},
    {"affine": False},
    {"track_running_stats": False},
    {"constant": "paper"},
    {"constant": 0.75},
    {"stats_dtype": "float64"},
    {"stats_dtype": torch.float64},
    {"sync": True},
    {"eps": 0.0, "momentum": 1.0, "affine": False, "constant": "none", "sync": True},
]
ATTRIBUTES = (
    "num_features eps momentum affine track_running_stats constant stats_dtype sync statistic"
)


@every_norm
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_repr_copies_and_pickles_equal_the_layer(norm: Norm, settings: dict[str, Any]) -> None:
    if not norm.has_statistic:
        settings = {name: value for name, value in settings.items() if name != "constant"}
    layer, x = norm.layer(**settings), torch.randn(4, 3, 2, 5)
    layer(x)
    for name, value in settings.items():
        assert getattr(layer, name) == (torch.float64 if name == "stats_dtype" else value)
    written = eval(repr(layer), {**vars(norms), "torch": torch})
    written.load_state_dict(layer.state_dict())
    for other in (written, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is type(layer)
        assert repr(other) == repr(layer)
        for name in ATTRIBUTES.split():
            assert getattr(other, name, None) == getattr(layer, name, None)
        flags = [[p.requires_grad for p in of.parameters()] for of in (other, layer)]
        assert flags[0] == flags[1]
        torch.testing.assert_close(other(x), copy.deepcopy(layer)(x), rtol=0, atol=0)


BAD_SETTINGS: dict[str, list[Any]] = {
    "eps must be finite and at least 0": [-1e-5, math.nan, math.inf, "small", False],
    "momentum must be between 0 and 1, or None": [1.5, "fast", -0.1, math.nan, True],
    "constant must be a finite number above 0": [[1], 0.0, True],
    "constant is 'exact', 'paper', 'official', 'none' or a number above 0": ["exakt"],
    "stats_dtype is None or one of float16, bfloat16, float32, float64": ["float46", "half"],
    "sync is True or False": ["no"],
    "affine is True or False": ["no"],
    "bias is True or False": ["no"],
    "track_running_stats is True or False": [2],
}


@pytest.mark.parametrize("message", BAD_SETTINGS)
@pytest.mark.parametrize("norm", [*map(NORMS.get, DISTINCT), NORMS["mean"]], ids=str)
def test_constructor_rejects_bad_settings(norm: Norm, message: str) -> None:
    name = message.split()[0]
    if name == "constant" and not norm.has_statistic:
        pytest.skip("it has no constant")
    for value in BAD_SETTINGS[message]:
        with pytest.raises(InputError, match=re.escape(f"{message}, got {value!r}")):
            norm.layer(**{name: value})


@pytest.mark.parametrize("p", [0.99, 0, -1, math.inf, math.nan, "2", True])
def test_constructor_rejects_bad_powers(p: Any) -> None:
    with pytest.raises(InputError, match=f"p must be finite and at least 1, got {p!r}"):
        norms.LpBatchNorm2d(3, p=p)


@pytest.mark.parametrize("k", [0, -1, 2.5, 10.0, "10", True, None])
def test_constructor_rejects_bad_counts(k: Any) -> None:
    with pytest.raises(InputError, match=f"k must be a whole number of at least 1, got {k!r}"):
        norms.TopKBatchNorm2d(3, k=k)
    for cls in (norms.L1BatchNorm2d, norms.LInfBatchNorm1d, norms.MeanOnlyBatchNorm2d):
        with pytest.raises(InputError, match="num_features must be a whole number of at least 1"):
            cls(k)


@pytest.mark.parametrize("constant", ["exact", "paper", "none", 0.5])
def test_top_k_rejects_fewer_values_than_k(constant: Any) -> None:
    layer = norms.TopKBatchNorm2d(3, k=10, constant=constant)
    with pytest.raises(InputError, match="k = 10 largest of n = 8 values a channel"):
        layer(torch.randn(2, 3, 2, 2))
    assert layer.num_batches_tracked == 0
