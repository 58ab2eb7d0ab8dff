"""Layers in int8: sums of integers by numpy, torch's classes and states, and what is kept apart."""

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nmlightning.errors import InputError
from nmlightning.int8 import (
    Int8Conv1d,
    Int8Conv2d,
    Int8Conv3d,
    Int8Linear,
    describe_backends,
    quantize_norm,
    quantizer,
)
from nmlightning.int8.backends import cpu_reason
from nmlightning.int8.layers import INT8_CLASSES
from nmlightning.kernels import norm_backend

BACKENDS: list[Any] = ["formula", "auto"]
BY_DIMS = {0: Int8Linear, 1: Int8Conv1d, 2: Int8Conv2d, 3: Int8Conv3d}
# Dimensions, the input's channels and sizes, the layer's arguments.
CASES: dict[str, tuple[int, tuple[int, ...], dict[str, Any]]] = {
    "linear": (0, (20,), {}),
    "linear of rows": (0, (4, 20), {"bias": False}),
    "1d": (1, (8, 11), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "2d": (2, (8, 9, 9), {"kernel_size": 3, "padding": (1, 2)}),
    "no padding": (2, (8, 9, 9), {"kernel_size": 3, "bias": False}),
    "stride": (2, (8, 9, 10), {"kernel_size": 3, "padding": 1, "stride": (2, 3)}),
    "dilation": (2, (8, 9, 9), {"kernel_size": (3, 2), "padding": 2, "dilation": 2}),
    "groups": (2, (8, 9, 9), {"kernel_size": 3, "padding": 1, "groups": 4}),
    "depthwise": (2, (12, 9, 9), {"kernel_size": 3, "padding": 1, "groups": 12}),
    "pointwise": (2, (8, 5, 5), {"kernel_size": 1, "stride": 2}),
    "much padding": (2, (8, 5, 5), {"kernel_size": 3, "padding": 4}),
    "3d": (3, (4, 5, 6, 7), {"kernel_size": 3, "padding": "same"}),
}


def make(dims: int, channels: int, **settings: Any) -> Any:
    if dims == 0:
        return Int8Linear(channels, 12, **settings)
    return BY_DIMS[dims](channels, 12, **settings)


def input_of(sizes: tuple[int, ...], layout: str = "NCHW") -> Tensor:
    x = torch.randn(3, *sizes)
    if layout == "NHWC":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.requires_grad_()


def whole_product(x: np.ndarray, weight: np.ndarray, layer: Any) -> np.ndarray:
    """Return the convolution of whole numbers (N, C, *) and (O, C / groups, *), tap by tap."""
    taps, dims = weight.shape[2:], weight.ndim - 2
    pads = layer._reversed_padding_repeated_twice
    sides = [(pads[2 * i], pads[2 * i + 1]) for i in reversed(range(dims))]
    x = np.pad(x, [(0, 0), (0, 0), *sides])
    rest = zip(x.shape[2:], taps, layer.dilation, layer.stride, strict=True)
    out = [(size - d * (k - 1) - 1) // s + 1 for size, k, d, s in rest]
    y = np.zeros((len(x), len(weight), *out), np.int64)
    share = len(weight) // layer.groups
    for place in np.ndindex(*taps):
        window = tuple(
            slice(d * i, d * i + s * (n - 1) + 1, s)
            for d, i, s, n in zip(layer.dilation, place, layer.stride, out, strict=True)
        )
        part = x[(slice(None), slice(None), *window)]
        for o in range(len(weight)):
            first = o // share * weight.shape[1]
            own = part[:, first : first + weight.shape[1]]
            y[:, o] += np.einsum("nc...,c->n...", own, weight[(o, slice(None), *place)])
    return y


@pytest.mark.parametrize("weight_range", ["tensor", "channel"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_output_is_a_sum_of_integers(
    name: str, backend: Any, layout: str, weight_range: Any
) -> None:
    dims, sizes, settings = CASES[name]
    channels = sizes[0] if dims else sizes[-1]
    layer, x = make(dims, channels, weight_range=weight_range, **settings), input_of(sizes, layout)
    grid = quantizer.make_grid(*quantizer.sample_mean(x.detach()), 8)
    weights = quantizer.symmetric_grid(layer.weight, 8, weight_range == "channel")
    whole = (quantizer.quantize(x.detach(), grid).long() - grid.zero_point.long()).numpy()
    signed = (quantizer.quantize(layer.weight.detach(), weights).long() - 128).numpy()
    expected = whole @ signed.T if dims == 0 else whole_product(whole, signed, layer)
    scales = (grid.scale.double() * weights.scale.double()).flatten().numpy()
    shape = (-1,) if dims == 0 else (-1, *[1] * dims)
    expected = expected * scales.reshape(shape)
    if layer.bias is not None:
        expected = expected + layer.bias.detach().double().numpy().reshape(shape)
    with norm_backend(backend):
        y = layer(x)
    # Sums are exact; the scales, their product and the bias are rounded once each.
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-6, atol=1e-6)
    if dims >= 2:
        assert y.is_contiguous() or layout == "NHWC"


@pytest.mark.parametrize("weight_range", ["tensor", "channel"])
@pytest.mark.parametrize("bifurcate", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_quantised_tensors(
    name: str, backend: Any, bifurcate: bool, weight_range: Any
) -> None:
    dims, sizes, settings = CASES[name]
    channels = sizes[0] if dims else sizes[-1]
    options = {"gradient_bits": 4, "rounding": "nearest", "weight_range": weight_range}
    layer = make(dims, channels, bifurcate=bifurcate, **settings, **options)
    x = input_of(sizes)
    with norm_backend(backend):
        y = layer(x)
        grad = torch.randn_like(y)
        y.backward(grad)
    plain = copy.deepcopy(layer).double()
    plain.__class__ = next(torchs for torchs, ours in INT8_CLASSES.items() if type(layer) is ours)
    weights = quantizer.symmetric_grid(layer.weight, 8, weight_range == "channel")
    with torch.no_grad():
        plain.weight.copy_(quantizer.dequantize(quantizer.quantize(layer.weight, weights), weights))
    grid = quantizer.make_grid(*quantizer.sample_mean(x.detach()), 8)
    exact_x = (
        quantizer.dequantize(quantizer.quantize(x.detach(), grid), grid).double().requires_grad_()
    )
    relative = (weights.scale / weights.scale.max()).flatten()
    relative = relative.view(-1, *[1] * dims) if weight_range == "channel" else relative
    scaled = grad * relative
    gradients = quantizer.make_grid(*quantizer.extreme(scaled), 4)
    rounded = (
        quantizer.dequantize(quantizer.quantize(scaled, gradients), gradients) / relative
    ).double()
    kept = [plain.weight] if plain.bias is None else [plain.weight, plain.bias]
    output = plain(exact_x)
    (expected_x,) = torch.autograd.grad(output, [exact_x], rounded, retain_graph=True)
    expected = torch.autograd.grad(output, kept, grad.double() if bifurcate else rounded)
    # Sums of hundreds of terms in float32, in torch's order; absolute, since terms cancel.
    close = {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(x.grad.double(), expected_x, **close)
    for found, parameter in zip(expected, layer.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.double(), found, **close)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_gradient_is_untouched_by_gradient_bits(dtype: Any) -> None:
    x, found = input_of((8, 9, 9)), []
    for bits in (2, 8):
        torch.manual_seed(1)
        layer = Int8Conv2d(8, 12, 3, gradient_bits=bits, weight_gradient=dtype)
        layer(x).pow(2).sum().backward()
        found.append((layer.weight.grad, layer.bias.grad))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_bfloat16_weight_gradients_are_near_those_in_float32() -> None:
    x, found = input_of((8, 9, 9)), []
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(1)
        layer = Int8Conv2d(8, 12, 3, weight_gradient=dtype)  # type: ignore[arg-type]
        layer(x).pow(2).sum().backward()
        found.append(layer.weight.grad)
    assert found[1].dtype == torch.float32
    # 8 bits of mantissa for each gradient and for the sum.
    assert (found[1] - found[0]).norm() < 2**-8 * found[0].norm()
    assert not torch.equal(*found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cls", [Int8Conv2d, Int8Linear])
def test_zero_gives_zero_and_infinity_is_not_hidden(cls: type, backend: Any) -> None:
    layer = Int8Conv2d(4, 6, 3) if cls is Int8Conv2d else Int8Linear(4, 6)
    x = input_of((4, 5, 5) if cls is Int8Conv2d else (4,))
    with norm_backend(backend):
        y = layer(x)
        y.backward(torch.zeros_like(y))
        assert all((q.grad == 0).all() for q in (x, *layer.parameters()))
        assert torch.equal(layer(torch.zeros_like(x)) != 0, (layer.bias != 0).view(
            1, -1, *[1] * (y.dim() - 2)).expand_as(y))  # fmt: skip
        grad = torch.ones_like(y)
        grad[0, 0] = torch.inf
        x.grad = layer.weight.grad = None
        layer(x).backward(grad)
        assert not x.grad.isfinite().any()
        assert not layer.weight.grad.isfinite().all()
        before = copy.deepcopy(layer.state_dict())
        bad = x.detach().clone()
        bad[0, 0] = torch.nan
        for mode in (True, False):
            assert layer.train(mode)(bad).isnan().all()
        torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_is_the_same_twice_and_for_a_sample_alone(backend: Any) -> None:
    layer, x = Int8Conv2d(4, 6, 3), input_of((4, 5, 5))
    fresh = copy.deepcopy(layer).eval()
    with norm_backend(backend):
        torch.testing.assert_close(fresh(x), layer(x), rtol=0, atol=0)  # by the batch's own range
        layer.eval()
        y = layer(x)
        assert torch.equal(y, layer(x))
        assert torch.equal(y[:1], layer(x[:1]))
        assert torch.equal(layer(1000 * x), layer(1e6 * x))  # clipped by the running range


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_range_has_torchs_momentum(momentum: float | None) -> None:
    layer = Int8Linear(5, 3, momentum=momentum)
    batches = [torch.randn(4, 5) for _ in range(3)]
    expected = None
    for count, batch in enumerate(batches, 1):
        layer(batch)
        low = float(batch.amin(1).mean())
        weight = 1 / count if momentum is None else momentum
        expected = low if expected is None else (1 - weight) * expected + weight * low
    assert float(layer.running_min) == pytest.approx(expected)
    assert layer.num_ranges_tracked == 3
    layer(batches[0][:0])
    assert layer.num_ranges_tracked == 3


@pytest.mark.parametrize("cls", INT8_CLASSES.values())
def test_layers_are_torchs_by_class_and_state(cls: Any) -> None:
    torchs = next(torchs for torchs, ours in INT8_CLASSES.items() if ours is cls)
    arguments = (4, 6) if cls is Int8Linear else (4, 6, 3)
    layer, plain = cls(*arguments), torchs(*arguments)
    assert isinstance(layer, torchs)
    ranges = {"running_min", "running_max", "num_ranges_tracked"}
    assert layer.state_dict().keys() == plain.state_dict().keys() | ranges
    answer = plain.load_state_dict(layer.state_dict(), strict=False)
    assert set(answer.unexpected_keys) == ranges
    assert not answer.missing_keys
    assert set(layer.load_state_dict(plain.state_dict(), strict=False).missing_keys) == ranges
    assert torch.equal(layer.weight, plain.weight)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(copied.state_dict(), layer.state_dict())
    buffer = io.BytesIO()
    torch.save(layer.half().state_dict(), buffer)
    buffer.seek(0)
    assert torch.load(buffer)["running_min"].dtype == torch.float32  # weights_only
    options = {"bits": 4, "rounding": "nearest", "bifurcate": False}
    described = repr(cls(*arguments, **options))
    assert described.endswith("bits=4, rounding='nearest', bifurcate=False)")
    assert described.startswith(cls.__name__)


@pytest.mark.parametrize("weight_range", ["tensor", "channel"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning")
@pytest.mark.parametrize(("channels", "shape"), [((4, 0), (2, 4)), ((0, 4), (2, 0))])
def test_layers_without_weights_are_torchs(channels: Any, shape: Any, weight_range: Any) -> None:
    linear, x = Int8Linear(*channels, weight_range=weight_range), torch.ones(shape)
    assert torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))
    if channels[0] == 0:  # torch refuses the other
        conv = Int8Conv2d(*channels, 1, weight_range=weight_range)
        assert torch.equal(conv(x[..., None, None]), nn.Conv2d.forward(conv, x[..., None, None]))


@pytest.mark.parametrize("settings", [
    {"padding": "same"}, {"padding": "valid"}, {"kernel_size": 2, "padding": "same"},
    *({"padding_mode": mode, "padding": (1, 2)} for mode in ("reflect", "replicate", "circular")),
])  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_padding_is_torchs(settings: dict[str, Any], backend: Any) -> None:
    settings = {"kernel_size": 3, **settings}
    layer, plain = Int8Conv2d(4, 6, **settings), nn.Conv2d(4, 6, **settings)
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(2, 4, 6, 7)
    with norm_backend(backend):
        y = layer(x)
    expected = plain(x)
    # Steps of 1/40 of σ, and what the mean range clips; other padding is off by half at the rim.
    assert (y - expected).norm() < 0.05 * expected.norm()
    single = layer(x[0])
    assert single.shape == expected.shape[1:]


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_are_torchs(backend: Any) -> None:
    layer, x = Int8Conv2d(4, 6, 3), input_of((4, 5, 5))
    with norm_backend(backend):
        expected = layer(x)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                y = layer(x)
            torch.testing.assert_close(y, expected.to(dtype))
            y.float().sum().backward()
            assert (x.grad.dtype, layer.weight.grad.dtype) == (torch.float32,) * 2
            half, own = copy.deepcopy(layer).to(dtype), x.detach().to(dtype).requires_grad_()
            half(own).sum().backward()
            assert (own.grad.dtype, half.weight.grad.dtype) == (dtype,) * 2
        assert layer.double()(x.double()).dtype == torch.float64
        layer.float()(x[:0]).sum().backward()


def test_what_is_kept_for_backward_is_a_quarter() -> None:
    kept: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        kept[saved.data_ptr()] = saved.nbytes
        return saved

    layer, x = Int8Conv2d(16, 16, 3, padding=1), input_of((16, 32, 32))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        layer(x)
    assert sum(kept.values()) <= 0.27 * x.nbytes


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Int8Linear(8, 16), (20, 8)),
        (Int8Linear(8, 16), (4, 5, 8)),
        (Int8Conv2d(8, 16, 1), (4, 8, 1, 1)),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_follows_may_change_the_output_in_place(
    layer: Any, shape: tuple[int, ...], backend: Any
) -> None:
    x = torch.randn(shape, requires_grad=True)
    with norm_backend(backend):
        torch.manual_seed(0)
        nn.ReLU(inplace=True)(layer(x)).sum().backward()
        found, x.grad = x.grad, None
        torch.manual_seed(0)
        nn.ReLU()(layer(x)).sum().backward()
    assert torch.equal(found, x.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_computes_the_same(reentrant: bool) -> None:
    layer, x = Int8Conv2d(4, 8, 3, rounding="nearest"), torch.randn(2, 4, 6, 6, requires_grad=True)
    layer(x).square().sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("bifurcate", [True, False])
def test_a_channel_of_zeros_does_not_coarsen_the_gradient(bifurcate: bool) -> None:
    torch.manual_seed(0)
    settings = {"weight_range": "channel", "rounding": "nearest", "bifurcate": bifurcate}
    layer, x = Int8Conv2d(16, 32, 3, **settings), torch.randn(4, 16, 8, 8, requires_grad=True)
    with torch.no_grad():
        layer.weight[0] = 0
        layer.weight[1:] *= 0.1
    grad = torch.randn(4, 32, 6, 6)
    layer(x).backward(grad)
    (exact,) = torch.autograd.grad(torch.nn.functional.conv2d(x, layer.weight), x, grad)
    assert torch.cosine_similarity(x.grad.flatten(), exact.flatten(), dim=0) > 0.999
    assert layer.weight.grad.isfinite().all()
    torch.nn.init.zeros_(layer.weight)
    assert layer(x).sub(layer.bias.view(-1, 1, 1)).count_nonzero() == 0


def test_another_default_dtype_changes_neither_backends_nor_ranges() -> None:
    cpu_reason.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = Int8Conv2d(64, 8, 3)
        found = describe_backends(nn.Sequential(layer))
    finally:
        torch.set_default_dtype(torch.float32)
        cpu_reason.cache_clear()
    assert found == describe_backends(nn.Sequential(Int8Conv2d(64, 8, 3)))
    assert layer.running_min.dtype == torch.float32


def quantised() -> nn.Module:
    norm = nn.BatchNorm1d(4)
    quantize_norm(norm)
    return norm


@pytest.mark.parametrize("make", [lambda: Int8Linear(4, 6), quantised])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # which forward mode does
def test_second_derivatives_and_transforms_are_refused(make: Any) -> None:
    layer, x = make(), input_of((4,))
    (grad,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    what = "quantised norm" if isinstance(layer, nn.BatchNorm1d) else "layer in int8"
    with pytest.raises(RuntimeError, match=f"This {what} can be differentiated once"):
        grad.sum().backward()
    y = layer(x)
    for call in (
        lambda: torch.func.vmap(layer)(torch.randn(2, 3, 4)),
        lambda: torch.func.jvp(layer, (x,), (x,)),
        lambda: torch.autograd.grad(y, x, torch.ones(2, *y.shape), is_grads_batched=True),
    ):
        with pytest.raises(InputError, match="int8 is not for torch"):
            call()


@pytest.mark.parametrize("make", [lambda: Int8Linear(4, 6), quantised])
def test_large_inputs_stay_finite(make: Any) -> None:
    """The sum of the samples' ranges is above the largest float32, 3.4e38."""
    layer, x = make(), 1e37 * torch.randn(200, 4).clamp(-3, 3).requires_grad_()
    layer(x).sum().backward() if isinstance(layer, Int8Linear) else layer.eval()(x)
    assert all(layer.train(mode)(x).isfinite().all() for mode in (True, False))
    assert 1e36 < layer.running_max < 1e38


def test_large_convolutions_and_gradients_stay_finite() -> None:
    """A sum times the input's scale is above the largest float32, the output is not."""
    layer = Int8Conv2d(64, 8, 3, bias=False, rounding="nearest")
    x = (1e35 * torch.randn(8, 64, 9, 9)).requires_grad_()
    found = []
    for backend in ("auto", "formula"):
        with norm_backend(backend):
            y = layer.train()(x)
            found.append((y, *torch.autograd.grad(y, x, torch.full_like(y, 1e36))))
    for ours, expected in zip(*found, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours / 1e35, expected / 1e35, rtol=1e-6, atol=1e-5)


def test_a_seed_makes_gradients_the_same() -> None:
    layer, x = Int8Conv2d(4, 6, 3, gradient_bits=2), input_of((4, 5, 5))

    def run() -> Tensor:
        return torch.autograd.grad(layer(x).pow(2).sum(), x)[0]

    state = torch.get_rng_state()
    first, second = run(), run()
    torch.set_rng_state(state)
    assert torch.equal(run(), first)
    assert not torch.equal(first, second)


def test_the_compiler_traces_the_formula_whole() -> None:
    layer, x = Int8Conv2d(4, 6, 3, rounding="nearest"), input_of((4, 5, 5))
    traced = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    with norm_backend("auto"):
        outputs = [net(x) for net in (traced, layer)]
        gradients = [torch.autograd.grad(y.pow(2).sum(), x)[0] for y in outputs]
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Int8Linear(3, 4, bits=9), "bits is a whole number of 2 … 8, got 9"),
        (lambda: Int8Linear(3, 4, rounding="up"), "rounding is 'stochastic' or 'nearest'"),  # type: ignore[arg-type]
        (lambda: Int8Linear(3, 4, momentum=2), "momentum must be between 0 and 1"),
        (lambda: Int8Linear(3, 4, bits=8.0), "bits is a whole number"),  # type: ignore[arg-type]
        (lambda: Int8Linear(3, 4)(torch.ones(2, 3).long()), "takes floating inputs, got"),
        (lambda: Int8Conv2d(3, 4, 5)(torch.ones(2, 3, 2, 2)), r"kernel \(5, 5\) is larger than"),
        (lambda: Int8Linear(3, 4)(torch.ones(2, 4)), "takes inputs of 3 features, got"),
        (lambda: Int8Conv2d(3, 4, 3)(torch.ones(2, 4, 5, 5)), r"takes \(N, 3, \*\) inputs of 4"),
    ],
)
def test_errors_say_what_was_wrong(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
