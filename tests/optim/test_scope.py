"""Which weights a rule takes from a model, or from names and shapes alone, and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nmlightning.errors import InputError
from nmlightning.optim import DecayEquivalentLR, LRCorrection, NormSchedule
from nmlightning.weights.channel_norms import ChannelLayout, channel_norms
from nmlightning.weights.history import NormHistory
from nmlightning.weights.layer_weights import find_layer_weights

MakeRule = Callable[..., Any]
REFERENCED = ("stable", "paper", "layer", "schedule")
OF_CONVOLUTIONS = (*REFERENCED, "decay")
pytestmark = pytest.mark.filterwarnings("ignore:LRCorrection.mode=.paper.. has no brake")


class Mixed(nn.Module):
    """Has a convolution each way, and a parameter of three dimensions that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.pos = nn.Parameter(torch.zeros(1, 2, 8))
        self.conv = nn.Conv2d(2, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False)
        self.head = nn.Linear(6, 3)


def record(net: nn.Module) -> NormHistory:
    weights = find_layer_weights(net)
    norms = {w.name: channel_norms(w.parameter, layout=w.layout)[None].numpy() for w in weights}
    return NormHistory.from_arrays(norms, [10], [0])


def sgd(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=0.02)


def steered(handle: Any) -> dict[str, ChannelLayout]:
    return {weight.name: weight.layout for weight in handle.weights}


@pytest.mark.parametrize("rule_name", OF_CONVOLUTIONS)
def test_a_model_tells_its_convolutions_and_their_channels(make_rule: MakeRule) -> None:
    net = Mixed()
    for model in (net, torch.compile(net, backend="eager")):
        handle = make_rule(record(net)).attach(sgd(net), model)
        assert steered(handle) == {
            "conv.weight": ChannelLayout(),
            "up.weight": ChannelLayout(2),
        }


@pytest.mark.parametrize("rule_name", REFERENCED)
def test_shapes_alone_are_compared_with_the_recording(make_rule: MakeRule) -> None:
    net = Mixed()
    history = record(net)
    with pytest.warns(UserWarning, match=r"recording has no pos, .* it is left alone: exclude it"):
        handle = make_rule(history).attach(
            sgd(net), net.named_parameters(), {"up.weight": ChannelLayout(2)}
        )
    assert list(steered(handle)) == ["conv.weight", "up.weight"]
    with pytest.raises(InputError, match="of another model: it has no 'pos'"):
        make_rule(history, include=["pos"]).attach(sgd(net), net.named_parameters())
    other = NormHistory.from_arrays({"layer.weight": [[1.0]]}, [10], [0])
    with pytest.raises(InputError, match="of another model: it has no 'pos'"):
        make_rule(other).attach(sgd(net), net.named_parameters())
    with pytest.raises(InputError, match=r"of another model: it has no 'conv\.weight'"):
        make_rule(other).attach(sgd(net), net)


@pytest.mark.parametrize("rule_name", REFERENCED)
def test_channels_that_shapes_alone_do_not_tell(make_rule: MakeRule) -> None:
    net = Mixed()
    message = (
        "up.weight has 6 output channels there and 4 here. If it is a transposed convolution, "
        r"give attach the model itself, which tells where its channels are."
    )
    with pytest.raises(InputError, match=message):
        make_rule(record(net), exclude=["pos"]).attach(sgd(net), net.named_parameters())


@pytest.mark.parametrize(
    ("include", "message"),
    [
        (
            ["norm.weight"],
            r"norm.weight cannot be steered: expected a .* of shape \(4,\)\. Take it",
        ),
        ("norm.weight", r"include is a list, got the string 'norm.weight'"),
        ([3], r"include is a list of strings, got \[3\]"),
    ],
)
def test_includes_that_are_none(make_rule: MakeRule, include: Any, message: str) -> None:
    net = Mixed()
    with pytest.raises(InputError, match=message):
        make_rule(record(net), include=include).attach(sgd(net), net)


@pytest.mark.parametrize(
    "given", [lambda net: net.parameters(), lambda net: 3, lambda net: net.state_dict()]
)
def test_names_that_are_missing(make_rule: MakeRule, given: Callable[[nn.Module], Any]) -> None:
    net = Mixed()
    with pytest.raises(InputError, match=r"attach takes the model or its named_parameters\(\), go"):
        make_rule(record(net)).attach(sgd(net), given(net))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LRCorrection(None), "reference is a NormHistory or a path, got None"),  # type: ignore[arg-type]
        (lambda: NormSchedule(3), "reference is a NormHistory or a path, got 3"),  # type: ignore[arg-type]
        (
            lambda: LRCorrection("a", max_factor="1"),  # type: ignore[arg-type]
            "max_factor is a positive number, or None, got '1'",
        ),  # type: ignore[arg-type]
        (
            lambda: LRCorrection("a", max_rotation=True),
            "max_rotation is a positive number, or None",
        ),
        (lambda: NormSchedule("a", max_rotation="x"), "max_rotation is a positive number, or None"),  # type: ignore[arg-type]
        (lambda: NormSchedule("a", "0.1"), "base_lr is a positive number, or None, got '0.1'"),  # type: ignore[arg-type]
        (lambda: DecayEquivalentLR("1e-4"), "weight_decay must be 0 or more, got '1e-4'"),  # type: ignore[arg-type]
    ],
)
def test_settings_of_another_type(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_one_rule_for_one_weight() -> None:
    net = Mixed()
    optimizer = sgd(net)
    first = DecayEquivalentLR(0.01, exclude=["up.*"]).attach(optimizer, net)
    message = "conv.weight is steered by DecayEquivalentLR already: remove that, or exclude"
    with pytest.raises(InputError, match=message):
        LRCorrection(record(net)).attach(optimizer, net)
    LRCorrection(record(net), exclude=["conv.*"]).attach(optimizer, net)
    first.remove()
    LRCorrection(record(net), exclude=["up.*"]).attach(optimizer, net)


def test_flat_names(make_rule: MakeRule) -> None:
    """What holds the parameters may yield them only once."""
    net = Mixed()
    pairs: list[tuple[str, Tensor]] = [("conv.weight", net.conv.weight)]
    handle = make_rule(record(net)).attach(sgd(net), iter(pairs))
    assert list(steered(handle)) == ["conv.weight"]
