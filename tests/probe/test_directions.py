"""Rounding turns a network's tensors as far as integers in numpy say, and the report says so."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nmlightning import InputError, probe_int8
from nmlightning.int8 import Int8Conv2d, Int8Linear
from nmlightning.int8.quantizer import cosine_bound
from nmlightning.probe.directions import CAVEAT, Directions, DirectionWatch, LayerDirections

BITS = (8, 4, 2)
Array = NDArray[np.float64]


def squares(model: nn.Module, x: Any) -> Tensor:
    return (model(x) - 1).square().mean()


def rounded(x: Array, low: float, high: float, bits: int, zero: int | None = None) -> Array:
    """Return the numbers that a range can say next to x."""
    low, high, steps = min(low, 0), max(high, 0), 2**bits - 1
    scale = (high - low) / steps
    zero = round(-low / scale) if zero is None else zero
    return (np.clip(np.round(x / scale) + zero, 0, steps) - zero) * scale


def expected_angle(tensor: str, x: Tensor, bits: int) -> float:
    """Return the angle in degrees, from the definition."""
    values = x.detach().double().numpy()
    if tensor == "weight":
        limit = np.abs(values).max()
        kept = rounded(values, -limit, limit, bits, 2 ** (bits - 1))
    elif tensor == "gradient":
        kept = rounded(values, values.min(), values.max(), bits)
    else:
        samples = values.reshape(len(values), -1)
        kept = rounded(values, samples.min(1).mean(), samples.max(1).mean(), bits)
    cosine = (values * kept).sum() / np.linalg.norm(values) / np.linalg.norm(kept)
    return math.degrees(math.acos(cosine))


def test_angles_are_those_of_integers_in_numpy() -> None:
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.Flatten(),
        nn.Linear(24, 5),
    )  # fmt: skip
    images = torch.randn(16, 4, 9, 9)
    found = probe_int8(net, [images], squares)
    values, tensors = images.requires_grad_(), {}
    for name, module in net.named_children():
        if name in ("0", "2", "4"):
            tensors[name] = {"input": values, "weight": module.weight}
            values = module(values)
            tensors[name]["gradient"] = values
        else:
            values = module(values)
    outputs = [each["gradient"] for each in tensors.values()]
    gradients = torch.autograd.grad((values - 1).square().mean(), outputs)
    for layer, gradient in zip(found.layers, gradients, strict=True):
        mine = {**tensors[layer.name], "gradient": gradient}
        assert layer.counts == {k: v.numel() for k, v in mine.items() if k in layer.cosines}
        assert ("gradient" in layer.cosines) is (layer.name != "0")  # whose images need none
        for tensor in layer.cosines:
            for bits in BITS:
                # 1e-6 of a cosine is what a tie may be rounded otherwise in float32.
                angle = expected_angle(tensor, mine[tensor], bits)
                assert layer.angle(tensor, bits) == pytest.approx(angle, rel=1e-2, abs=1e-2)


class Tied(nn.Module):
    """Two layers with one weight, one of which is called three times, once by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(input=self.first(x).relu())
        return self.second(checkpoint(self.first, x, use_reentrant=False))


class Casts(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class Branch(nn.Module):
    """Has a layer that gets no gradient, and one that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.dead, self.idle = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + self.dead(x).detach()


def convs() -> list[nn.Module]:
    return [nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(True), nn.Conv2d(6, 3, 3)]


def frozen() -> nn.Module:
    net = nn.Sequential(*convs())
    net[3].requires_grad_(False)
    return net


def normalised() -> nn.Module:
    return nn.Sequential(*convs()[:3], nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 2, 1)))


IMAGE, ROWS = (8, 6, 5, 5), (8, 6)
ALL = {"input", "weight", "gradient"}
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], torch.dtype, dict[str, set[str]]]]
NETS = {
    "plain": (lambda: nn.Sequential(*convs()), IMAGE, torch.float32, {"0": ALL, "3": ALL}),
    "half": (lambda: nn.Sequential(*convs()).half(), IMAGE, torch.float16, {"0": ALL, "3": ALL}),
    "double": (lambda: nn.Sequential(*convs()).double(), IMAGE, torch.float64, {"3": ALL}),
    "autocast": (lambda: Casts(*convs()), IMAGE, torch.float32, {"0": ALL, "3": ALL}),
    "frozen": (frozen, IMAGE, torch.float32, {"0": ALL, "3": ALL}),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), IMAGE, torch.float32, {"": ALL}),
    "one sample": (lambda: nn.Conv2d(6, 6, 3), IMAGE[1:], torch.float32, {"": ALL}),
    "one row": (lambda: nn.Linear(6, 4), ROWS[1:], torch.float32, {"": ALL}),
    "tied": (Tied, ROWS, torch.float32, {"first": ALL, "second": ALL}),
    "tokens": (Tied, (4, 3, 6), torch.float32, {"first": ALL, "second": ALL}),
    "spectral norm": (normalised, IMAGE, torch.float32, {"0": ALL, "3": ALL}),
    "branch": (Branch, ROWS, torch.float32, {"used": ALL, "dead": ALL - {"gradient"}}),
    "int8": (lambda: Int8Conv2d(6, 6, 3, bits=2), IMAGE, torch.float32, {"": ALL}),
    "channel": (lambda: Int8Linear(6, 6, weight_range="channel"), ROWS, torch.float32, {"": ALL}),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.filterwarnings("ignore:.*non-full backward hook:FutureWarning")
def test_every_network_is_measured_and_left_as_it_was(name: str) -> None:
    make, shape, dtype, expected = NETS[name]
    net, x = make(), torch.randn(shape).to(dtype).requires_grad_()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    random = torch.get_rng_state()
    found = probe_int8(net, [x.detach().requires_grad_(), x], squares)
    layers = {layer.name: layer for layer in found.layers}
    for layer, tensors in expected.items():
        assert set(layers[layer].cosines) == tensors
        for tensor in tensors:
            angles = [layers[layer].angle(tensor, bits) for bits in BITS]
            assert 0 < angles[0] < angles[1] < angles[2] < 90
    assert found.batches == 2
    assert torch.equal(torch.get_rng_state(), random)
    after = net.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in state.items())
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks for m in net.modules())
    assert str(found).isprintable or name


@pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning")
def test_layers_are_left_out_by_name() -> None:
    left = [nn.ConvTranspose2d(6, 6, 3), nn.LSTM(6, 6), nn.Linear(6, 0)]
    net = nn.ModuleList([Branch(), *left])
    found = probe_int8(
        net, [torch.randn(ROWS)], lambda net, x: squares(net[0], x) + net[3](x).sum(), (2, 2)
    )
    assert found.bits == [2]
    assert found.left_out == {
        "1": "ConvTranspose2d: a transposed convolution",
        "2": "LSTM: its own code reads its weights",
        "0.idle": "Linear saw no batch",
        "3": "Linear saw no batch",
    }
    assert "left out    0.idle and 1 more: Linear saw no batch" in found.describe()


def test_measuring_advances_no_power_iteration() -> None:
    nets = [nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(ROWS)
    with DirectionWatch(nets[0]) as watch:
        nets[0](x)
    nets[1](x)
    assert 0 < watch.take_angles()["", "weight"][0] < 2
    for kept, expected in zip(nets[0].buffers(), nets[1].buffers(), strict=True):
        assert torch.equal(kept, expected)


def test_the_worst_call_counts() -> None:
    net = nn.Linear(2, 4)
    easy, hard = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.45], [1.0, 0.45]])
    angles = [
        probe_int8(net, batches, squares, [2]).layers[0].angle("input", 2)
        for batches in ([easy], [hard], [hard, easy], [easy, hard])
    ]
    assert angles[0] == 0 < angles[1] == angles[2] == angles[3]


def test_a_gradient_is_scaled_as_the_layer_does_it() -> None:
    """With a scale for each channel what is rounded is s_o · ∂y, which here is even."""
    layers = [Int8Linear(4, 2, False, weight_range=each) for each in ("tensor", "channel")]
    factors = torch.tensor([1.0, 1e-3])
    angles = []
    for layer in layers:
        layer.weight.data = torch.randn(1, 4) / factors[:, None]
        x = torch.randn(8, 4).requires_grad_()
        found = probe_int8(layer, [x], lambda net, x: (net(x) * factors).sum(), [2])
        angles.append(found.layers[0].angle("gradient", 2))
    assert angles[0] > 1e-3 > angles[1]


@pytest.mark.parametrize("tensor", sorted(ALL))
def test_what_is_not_finite_is_named(tensor: str) -> None:
    net, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), torch.randn(ROWS)
    if tensor == "input":
        x[0, 0] = math.nan
    elif tensor == "weight":
        net[1].weight.data[0, 0] = math.inf
    scale = math.inf if tensor == "gradient" else 1
    found = probe_int8(net, [x], lambda net, x: net(x).sum() * scale)
    text, plain = str(found), json.dumps(found.as_plain(), allow_nan=False)
    first = "0" if tensor == "input" else "1"
    assert f"There is inf or NaN in the {tensor} of {first}" in text
    assert "NaN" in text
    assert "null" in plain


def layer(name: str, angles: dict[str, Sequence[float]], count: int = 10_000) -> LayerDirections:
    kept = {
        tensor: {b: math.cos(math.radians(a)) for b, a in zip(BITS, each, strict=True)}
        for tensor, each in angles.items()
    }
    return LayerDirections(name, "Conv2d", kept, dict.fromkeys(kept, count))


GOOD, BAD = (0.5, 10, 35), (1, 30, 60)
FIRST = layer("conv1", {"input": GOOD, "weight": GOOD})
SECOND = layer("conv2", {"input": GOOD, "weight": GOOD, "gradient": BAD})


def test_the_table_marks_what_is_lost() -> None:
    found = Directions([FIRST, SECOND], BITS, 1, {})
    title, _, headings, _, first, second = map(str.split, str(found.table()).splitlines())
    assert " ".join(title) == "Degrees turned by rounding to 8, 4 and 2 bits; ! is beyond the bound"
    assert headings == ["layer", "input", "weight", "gradient"]
    assert first == ["conv1", *["0.5°", "10°", "35°"] * 2, "—"]
    assert second == ["conv2", *["0.5°", "10°", "35°"] * 2, "1.0°", "!30°", "!60°"]


@pytest.mark.parametrize(
    ("layers", "lines"),
    [
        ([FIRST], ["8, 4 and 2 bits keep every direction.", "2 of inputs and weights, 2 of"]),
        (
            [FIRST, SECOND],
            [
                "8 bits keep every direction.",
                "4 bits lose the direction of the gradient in 1 of 2 layers, most in conv2: its "
                "gradient turns by 30°, the bound is 22°.",
                "2 bits lose the direction of the gradient in 1 of 2 layers, most in conv2: its "
                "gradient turns by 60°, the bound is 40°.",
                "2 of inputs and weights, 8 of gradients.",
            ],
        ),
        ([layer("a", {"weight": (7, 8, 9)})], ["8 bits lose", "none of these of inputs and"]),
    ],
)
def test_the_verdict_says_which_layers_lose_it(
    layers: list[LayerDirections], lines: list[str]
) -> None:
    text = Directions(layers, BITS, 1, {}).describe()
    assert all(line in text for line in (*lines, CAVEAT)), text


def test_as_plain_has_angles_and_bounds() -> None:
    plain = json.loads(json.dumps(Directions([SECOND], BITS, 3, {"x": "why"}).as_plain()))
    assert (plain["bits"], plain["batches"], plain["left_out"]) == ([8, 4, 2], 3, {"x": "why"})
    (found,) = plain["layers"]
    assert (found["name"], found["class"]) == ("conv2", "Conv2d")
    assert found["gradient"]["values"] == 10_000
    assert found["gradient"]["degrees"] == pytest.approx({"8": 1, "4": 30, "2": 60})
    bound = math.degrees(math.acos(cosine_bound(4, 10_000)))
    assert found["gradient"]["bound"]["4"] == pytest.approx(bound)


@pytest.mark.parametrize(
    ("net", "batches", "bits", "message"),
    [
        (nn.ReLU(), 1, BITS, r"There is no convolution or linear layer to measure in ReLU\.$"),
        (nn.ConvTranspose2d(6, 6, 3), 1, BITS, "ConvTranspose2d: a transposed convolution"),
        (nn.Linear(6, 6), 0, BITS, "No batch was run: the data are empty"),
        ("model", 1, BITS, "model is a torch.nn.Module, got 'model'"),
        (nn.Linear(6, 6), 1, 8, "bits is a list of numbers of 2 … 8, got 8"),
        (nn.Linear(6, 6), 1, (), r"bits is a list of numbers of 2 … 8, got \(\)"),
        (nn.Linear(6, 6), 1, [9], "bits is a whole number of 2 … 8, got 9"),
    ],
)
def test_probe_int8_refuses_bad_input(net: Any, batches: int, bits: Any, message: str) -> None:
    x = torch.randn(IMAGE).requires_grad_()
    with pytest.raises(InputError, match=message):
        probe_int8(net, [x] * batches, squares, bits)
