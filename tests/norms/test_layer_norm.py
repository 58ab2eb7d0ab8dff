"""The contract of the layer and RMS norms, against a naive definition and torch's own."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batch_norm_contract import EXACT, check_compilation, check_half, gradients, saved_bytes
from nmlightning import norms
from nmlightning.errors import InputError

LAYER_POWERS = {"l1": 1.0, "lp1": 1.0, "lp1.5": 1.5, "lp2": 2.0, "lp3.7": 3.7, "scaled": 2.0}
LAYER_POWERS["scaled p1"] = 1.0
RMS_POWERS = {"rms l1": 1.0, "rms lp1.5": 1.5, "rms lp2": 2.0, "rms lp3.7": 3.7, "rms scaled": 2.0}
RMS_POWERS["rms scaled p1"] = 1.0
POWERS = {**LAYER_POWERS, **RMS_POWERS}
every_norm = pytest.mark.parametrize("norm", POWERS)
# Scaled ones have no options, compute in the dtype of the input and leave gradients to autograd.
every_power_mean = pytest.mark.parametrize("norm", [x for x in POWERS if "scaled" not in x])
every_layer_norm = pytest.mark.parametrize("norm", LAYER_POWERS)
SHAPES: list[tuple[tuple[int, ...], int | tuple[int, ...]]] = [
    ((4, 6), 6),
    ((2, 3, 6), (6,)),
    ((2, 3, 2, 5), (2, 5)),
    ((6,), 6),
    ((2, 3, 4), (2, 3, 4)),
]
every_shape = pytest.mark.parametrize(("shape", "normalized"), SHAPES, ids=str)


def is_rms(norm: str) -> bool:
    return norm in RMS_POWERS


def torchs(norm: str, normalized: Any, **settings: Any) -> nn.Module:
    """Return the layer of torch that has the same state."""
    return (nn.RMSNorm if is_rms(norm) else nn.LayerNorm)(normalized, **settings)


def make(norm: str, normalized: int | tuple[int, ...], **settings: Any) -> nn.Module:
    """Return the layer with a random weight and bias."""
    name = "Scaled" if "scaled" in norm else "L1" if norm.endswith("l1") else "Lp"
    name += "RMSNorm" if is_rms(norm) else "LayerNorm"
    powers = {} if name.startswith("L1") else {"p": POWERS[norm]}
    refused = ["bias"] * is_rms(norm) + ["constant", "stats_dtype"] * ("scaled" in norm)
    settings = {key: value for key, value in settings.items() if key not in refused}
    layer: nn.Module = getattr(norms, name)(normalized, **powers, **settings)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, mean=1.0)
    return layer


def define(layer: nn.Module, p: float, x: Tensor) -> Tensor:
    """Return the definition's output, by autograd's own rules; the slope at d = 0 is −1."""
    dims = tuple(range(-len(layer.normalized_shape), 0))
    is_centred = not isinstance(layer, nn.RMSNorm)
    d = x - x.mean(dims, keepdim=True) if is_centred else x
    eps = torch.finfo(x.dtype).eps if layer.eps is None else layer.eps
    size = torch.where(d > 0, d, -d)
    scale = size.pow(p).mean(dims, keepdim=True).pow(1 / p) if p > 1 else size.mean(dims, True)
    y = d / ((norms.gaussian_constant("lp", 2, p=p) * scale).square() + eps).sqrt()
    y = y if layer.weight is None else y * layer.weight.to(y.dtype)
    return y + layer.bias.to(y.dtype) if is_centred and layer.bias is not None else y


@every_norm
@every_shape
@pytest.mark.parametrize("parameters", ["both", "weight", "none"])
def test_output_and_gradients_equal_the_definition(
    norm: str, shape: Any, normalized: Any, parameters: str
) -> None:
    settings = {"elementwise_affine": parameters != "none", "bias": parameters == "both"}
    layer = make(norm, normalized, dtype=torch.float64, **settings)
    x = (2 * torch.randn(shape, dtype=torch.float64) + 1).requires_grad_()
    leaves = [x, *layer.parameters()]
    expected = define(layer, POWERS[norm], x)
    torch.testing.assert_close(layer(x), expected, **EXACT)
    torch.testing.assert_close(gradients(layer(x), leaves), gradients(expected, leaves), **EXACT)


@every_norm
def test_second_derivatives_pass_gradgradcheck(norm: str) -> None:
    layer = make(norm, 6, dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


@pytest.mark.parametrize("norm", [x for x in POWERS if "scaled p1" not in x])  # 0, by autograd
def test_ties_have_the_definitions_gradient(norm: str) -> None:
    half = torch.randint(-2, 3, (5, 6), dtype=torch.float64)
    x = torch.cat([half, -half], 1).requires_grad_()
    layer = make(norm, 12, dtype=torch.float64)
    expected = gradients(define(layer, POWERS[norm], x), [x])
    torch.testing.assert_close(gradients(layer(x), [x]), expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [1e-4, 1.0])
def test_eps_none_equals_torchs(dtype: torch.dtype, sigma: float) -> None:
    """It is float32's for half inputs, too: at this σ another gives another output."""
    x = (sigma * torch.randn(64, 32)).to(dtype)
    ours, theirs = norms.LpRMSNorm(32, p=2), nn.RMSNorm(32)
    # The last place of the dtype that is returned, twice; its own and torch's rounding.
    torch.testing.assert_close(
        ours.to(dtype)(x), theirs.to(dtype)(x), rtol=2 * torch.finfo(dtype).eps, atol=0
    )


@every_layer_norm
def test_exact_constant_gives_unit_std(norm: str) -> None:
    """ŝ of 1,024 features varies by a few per cent; the mean over 4,000 tokens by 0.1 %."""
    layer = make(norm, 1024, elementwise_affine=False)
    with torch.no_grad():
        std = layer(5 * torch.randn(4000, 1024) + 3).std(1).mean().item()
    assert std == pytest.approx(1, abs=0.01)


@every_power_mean
def test_constant_scales_the_output(norm: str) -> None:
    x = torch.randn(4, 12, dtype=torch.float64)
    settings: dict[str, Any] = {"eps": 0.0, "elementwise_affine": False}
    exact, c = make(norm, 12, **settings), norms.gaussian_constant("lp", 12, p=POWERS[norm])
    torch.testing.assert_close(make(norm, 12, constant="none", **settings)(x), exact(x) * c)
    torch.testing.assert_close(make(norm, 12, constant=4, **settings)(x), exact(x) * c / 4)
    torch.testing.assert_close(make(norm, 12, constant="paper", **settings)(x), exact(x))


@every_layer_norm
@pytest.mark.parametrize("value", [0.0, 3.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_constant_token_gives_the_bias(norm: str, value: float, dtype: torch.dtype) -> None:
    x = torch.randn(3, 16).to(dtype)
    x[1] = value
    leaf, layer = x.requires_grad_(), make(norm, 16)
    y = layer(leaf)
    assert y.isfinite().all()
    assert all(grad.isfinite().all() for grad in gradients(y, [leaf, *layer.parameters()]))
    torch.testing.assert_close(y[1], layer.bias.to(dtype), rtol=0, atol=1e-2)


@pytest.mark.parametrize("norm", RMS_POWERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rms_norm_of_zeros_is_zero(norm: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 16).to(dtype)
    x[1] = 0
    leaf, layer = x.requires_grad_(), make(norm, 16, eps=1e-5)
    y = layer(leaf)
    assert torch.equal(y[1], torch.zeros_like(y[1]))
    assert all(grad.isfinite().all() for grad in gradients(y, [leaf, *layer.parameters()]))


@every_layer_norm
def test_single_feature_gives_the_bias(norm: str) -> None:
    x = torch.randn(3, 1, requires_grad=True)
    layer = make(norm, 1)
    torch.testing.assert_close(layer(x), nn.Parameter(layer.bias.expand(3, 1)))
    assert torch.equal(gradients(layer(x), [x])[0], torch.zeros(3, 1))


@every_power_mean
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_accumulate_in_float32(norm: str, dtype: torch.dtype) -> None:
    """Equal to the float64 formula on the same values up to one rounding of what is returned."""
    x = torch.randn(8, 8192) + (0 if is_rms(norm) else 10)
    layer = make(norm, 8192, eps=1e-5)
    check_half(layer, lambda high: define(layer, POWERS[norm], high), x.to(dtype))


@every_power_mean
def test_stats_dtype_float64_is_precise_far_from_zero(norm: str) -> None:
    x = torch.randn(4, 64) + 1000
    layer = make(norm, 64, stats_dtype="float64", eps=1e-5)
    exact = define(layer, POWERS[norm], x.double())
    # One rounding to float32; in float32 throughout, x − μ alone would cost 1000 · 2⁻²⁴ = 6e-5.
    torch.testing.assert_close(layer(x), exact.float(), rtol=2e-7, atol=1e-7)


@every_norm
def test_strided_and_empty_inputs_equal_torchs(norm: str) -> None:
    layer = make(norm, 6)
    x = torch.randn(4, 3, 6)
    for other in (x.transpose(0, 1), torch.stack([x, x], -1)[..., 0], x[:, :2], x.expand(4, 3, 6)):
        torch.testing.assert_close(layer(other), layer(other.contiguous()))
    empty = torch.randn(0, 3, 6, requires_grad=True)
    found = gradients(layer(empty), [empty, *layer.parameters()])
    expected = torchs(norm, 6)
    torch.testing.assert_close(found, gradients(expected(empty), [empty, *expected.parameters()]))


@every_power_mean
def test_layer_saves_no_more_than_torchs(norm: str) -> None:
    x = torch.randn(32, 64, requires_grad=True)
    assert saved_bytes(make(norm, 64), x) <= saved_bytes(torchs(norm, 64), x)


# Dynamo of torch 2.11 instantiates any autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("norm", ["l1", "lp3.7", "rms l1", "scaled", "rms scaled"])
def test_layer_compiles_without_graph_breaks(norm: str) -> None:
    check_compilation(make(norm, 6), 6)


ATTRIBUTES = ("normalized_shape", "p", "eps", "elementwise_affine", "constant", "stats_dtype")
SETTINGS: list[dict[str, Any]] = [
    {},
    {"eps": 1e-3},
    {"elementwise_affine": False},
    {"bias": False},
    {"constant": "none"},
    {"constant": 0.75},
    {"stats_dtype": "float64"},
    {"stats_dtype": torch.float64},
    {"eps": 0.0, "bias": False, "constant": "paper", "stats_dtype": "float32"},
]


@every_norm
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("normalized", [6, (6,), (2, 6)], ids=str)
def test_repr_copies_and_pickles_equal_the_layer(
    norm: str, settings: dict[str, Any], normalized: Any
) -> None:
    layer = make(norm, normalized, **settings)
    x = torch.randn(3, 2, 6)
    for again in (
        eval(repr(layer), {**vars(norms), "torch": torch}),
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
    ):
        assert type(again) is type(layer)
        assert repr(again) == repr(layer)
        for name in ATTRIBUTES:
            assert getattr(again, name) == getattr(layer, name)
        again.load_state_dict(layer.state_dict(), strict=True)
        torch.testing.assert_close(again(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": -1e-5}, "eps must be finite and at least 0, got -1e-05"),
        ({"constant": "exakt"}, r"got 'exakt'\. Did you mean 'exact'\?"),
        ({"constant": -1.0}, "constant must be a finite number above 0, got -1.0"),
        ({"stats_dtype": "float46"}, r"float64, got 'float46'\. Did you mean 'float64'\?"),
        ({"p": 0.5}, "p must be finite and at least 1, got 0.5"),
        ({"p": math.inf}, "p must be finite and at least 1, got inf"),
        ({"elementwise_affine": "no"}, "elementwise_affine is True or False, got 'no'"),
        ({"bias": "no"}, "bias is True or False, got 'no'"),
    ],
    ids=str,
)
def test_constructor_rejects_bad_settings(settings: dict[str, Any], message: str) -> None:
    for cls in (norms.LpLayerNorm, norms.LpRMSNorm):
        if "bias" not in settings or cls is norms.LpLayerNorm:
            with pytest.raises(InputError, match=message):
                cls(6, **settings)
    if settings.keys() <= {"eps", "elementwise_affine", "bias"}:
        with pytest.raises(InputError, match=message):
            norms.ScaledLayerNorm(6, **settings)


@pytest.mark.parametrize("normalized", [0, (), (3, 0), -1])
def test_constructor_rejects_no_features(normalized: Any) -> None:
    for cls in (norms.L1LayerNorm, norms.L1RMSNorm, norms.ScaledLayerNorm, norms.ScaledRMSNorm):
        with pytest.raises(InputError, match="normalized_shape must have sizes of at least 1, got"):
            cls(normalized)


@every_norm
@pytest.mark.parametrize("shape", [(4, 5), (6, 4), (), (5,)], ids=str)
def test_wrong_shapes_are_an_error(norm: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"normalises the last dimensions \(6,\), got an input of"):
        make(norm, 6)(torch.randn(shape))
