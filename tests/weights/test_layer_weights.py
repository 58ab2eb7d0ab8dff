import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from nmlightning.callbacks import WeightNormTracker
from nmlightning.errors import InputError
from nmlightning.parametrizations import WeightNorm, apply_weight_norm
from nmlightning.weights.channel_norms import ROWS, ChannelLayout, channel_norms
from nmlightning.weights.layer_weights import (
    find_layer_weights,
    find_lazy_weights,
    find_left_weights,
    find_recorded_weights,
)


def make_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, groups=1),
        nn.BatchNorm2d(4),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.Sequential(nn.Conv1d(6, 2, 1), nn.LayerNorm(2)),
        nn.Embedding(5, 2),
        nn.Linear(2, 7),
    )


def test_every_convolution_and_linear_layer() -> None:
    model = make_model()
    weights = find_layer_weights(model)
    assert [weight.name for weight in weights] == ["0.weight", "2.weight", "3.0.weight", "5.weight"]
    assert [weight.layout for weight in weights] == [ROWS, ChannelLayout(2), ROWS, ROWS]
    assert all(weight.parameter is model.get_parameter(weight.name) for weight in weights)
    channels = [len(channel_norms(weight.parameter, layout=weight.layout)) for weight in weights]
    assert [weight.channels for weight in weights] == channels == [4, 6, 2, 7]


def test_single_layer_is_found_by_its_weight() -> None:
    (weight,) = find_layer_weights(nn.Linear(2, 3))
    assert weight.name == "weight"


def test_patterns_choose_weights() -> None:
    model = make_model()
    names = [w.name for w in find_layer_weights(model, ["?.weight", "3.*"], ["2*"])]
    assert names == ["0.weight", "3.0.weight", "4.weight", "5.weight"]
    expected = "'1.*' matches no weight of two or more dimensions in Sequential; there is 0.w"
    with pytest.raises(InputError, match=re.escape(expected)):
        find_layer_weights(model, exclude=["1.*"])
    with pytest.raises(InputError, match="Sequential has no convolution or linear layer to watch"):
        find_layer_weights(model, exclude=["*"])
    with pytest.raises(InputError, match="ReLU has no convolution or linear layer to watch"):
        find_layer_weights(nn.ReLU())


def test_shared_weight_is_found_once() -> None:
    layer = nn.Linear(2, 2)
    tied = nn.Linear(2, 2)
    tied.weight = layer.weight
    names = [weight.name for weight in find_layer_weights(nn.Sequential(layer, layer, tied))]
    assert names == ["0.weight"]


class Halved(nn.Module):
    calls = 0

    def forward(self, original: torch.Tensor) -> torch.Tensor:
        Halved.calls += 1
        return original / 2

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


def test_parametrized_weight_gives_its_original() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(3, 4), nn.ConvTranspose2d(4, 6, 2))
    parametrizations.weight_norm(model[0])
    parametrize.register_parametrization(model[1], "weight", Halved())
    parametrizations.weight_norm(model[2])
    Halved.calls = 0
    weights = find_layer_weights(model)
    assert Halved.calls == 0
    assert [weight.name for weight in weights] == ["0.weight", "1.weight", "2.weight"]
    originals = [
        model[0].parametrizations.weight.original1,
        model[1].parametrizations.weight.original,
        model[2].parametrizations.weight.original1,
    ]
    assert all(w.parameter is original for w, original in zip(weights, originals, strict=True))


def test_names_without_torch_compile() -> None:
    model = nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"))
    assert [weight.name for weight in find_layer_weights(model)] == ["0.weight"]


def test_lazy_layers_are_left_out_and_named() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3), nn.LazyConv2d(3, 1))
    assert [weight.name for weight in find_layer_weights(model)] == ["1.weight"]
    assert find_lazy_weights(model) == ["0.weight", "2.weight"]
    assert find_lazy_weights(model, ["0.*", "1.*"]) == ["0.weight"]
    assert find_lazy_weights(model, exclude=["0.*"]) == ["2.weight"]
    assert len(find_layer_weights(model, exclude=["0.*", "2.*"])) == 1
    for include in ([], ["0.weight"]):
        with pytest.raises(InputError, match=r"weight, which has no shape yet; run a batch"):
            find_layer_weights(model, include, exclude=["1.*"])


def test_strings_for_lists_are_refused() -> None:
    for patterns in ({"include": "0.weight"}, {"exclude": "0.weight"}):
        message = f"{next(iter(patterns))} is a list, got the string '0.weight': write"
        with pytest.raises(InputError, match=message):
            find_layer_weights(make_model(), **patterns)
        with pytest.raises(InputError, match=message):
            WeightNormTracker(**patterns)
    with pytest.raises(InputError, match=r"include is a list of strings, got \[1\]"):
        find_layer_weights(make_model(), [1])


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
def test_old_weight_norm_and_pruning_give_the_original() -> None:
    model = nn.Sequential(
        nn.utils.weight_norm(nn.Conv2d(2, 3, 3)),
        prune.l1_unstructured(nn.Linear(3, 4), "weight", amount=0.5),
        nn.utils.weight_norm(nn.ConvTranspose2d(4, 6, 2), dim=1),
        nn.utils.weight_norm(nn.Linear(3, 4), dim=None),
        nn.utils.spectral_norm(nn.Linear(3, 4)),
    )
    weights = find_layer_weights(model)
    assert [weight.name for weight in weights] == [f"{number}.weight" for number in range(5)]
    parameters = dict(model.named_parameters())
    expected = ["0.weight_v", "1.weight_orig", "2.weight_v", "3.weight_v", "4.weight_orig"]
    assert all(w.parameter is parameters[n] for w, n in zip(weights, expected, strict=True))


def test_weight_that_is_no_parameter_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    made = model[0].weight * 2
    del model[0].weight
    model[0].weight = made
    assert [weight.name for weight in find_layer_weights(model)] == ["1.weight"]


@pytest.mark.parametrize("p", [1, 2, float("inf")])
@pytest.mark.parametrize("form", [{}, {"kind": "weight"}, {"gain": "channel"}])
def test_normalised_and_unnormalised_weights_are_recorded(p: float, form: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Linear(3, 2))
    apply_weight_norm(net, p=p, **form)
    with torch.no_grad():
        for norm in net.modules():
            if isinstance(norm, WeightNorm) and norm.gain is not None:
                norm.gain.mul_(torch.linspace(-2, -1, norm.gain.numel()).view_as(norm.gain))
        hidden = net[0].parametrizations.weight.original.mul_(3)
    recorded = {weight.name: weight for weight in find_recorded_weights(net)}
    assert sorted(recorded) == ["0.weight", "0.weight_v", "1.weight", "1.weight_v", "2.weight"]
    torch.testing.assert_close(recorded["0.weight_v"].norms(), channel_norms(hidden))
    for layer in (0, 1):
        weight = recorded[f"{layer}.weight"]
        exact = channel_norms(net[layer].weight, layout=weight.layout)
        torch.testing.assert_close(weight.norms(), exact)
    assert {w.name for w in find_recorded_weights(net, ["0.weight"])} == {"0.weight", "0.weight_v"}


COMPUTED = {
    "weight norm": parametrizations.weight_norm,
    "old weight norm": nn.utils.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "old spectral norm": nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "pruned spectral norm": lambda layer: prune.l1_unstructured(
        nn.utils.spectral_norm(layer), "weight_orig", amount=0.5
    ),
}


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
def test_computed_weights_are_recorded_as_they_compute(name: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 3, groups=2))
    for layer in net:
        COMPUTED[name](layer)
        with torch.no_grad():
            layer(torch.randn(1, layer.in_channels, 5, 5))  # type: ignore[arg-type]
            for parameter in layer.parameters():
                parameter.mul_(3)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    recorded = {weight.name: weight for weight in find_recorded_weights(net)}
    norms = {key: weight.norms() for key, weight in recorded.items()}
    assert list(norms) == ["0.weight", "1.weight", "0.weight_v", "1.weight_v"]
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    for number, layer in enumerate(net.eval()):
        layer(torch.randn(1, layer.in_channels, 5, 5))  # type: ignore[arg-type]
        layout = recorded[f"{number}.weight"].layout
        torch.testing.assert_close(
            norms[f"{number}.weight"], channel_norms(layer.weight, 2, layout)
        )
        behind = channel_norms(recorded[f"{number}.weight_v"].parameter, 2, layout)
        torch.testing.assert_close(norms[f"{number}.weight_v"], behind)


class Matrix(nn.Module):
    """A linear layer that nobody knows, and what is none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))
        self.position = nn.Parameter(torch.ones(1, 5, 3))
        self.scale = nn.Parameter(torch.ones(3, 1, 1))


class LowRank(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return weight[:, :1], torch.ones(1, weight.shape[1])


def test_matrices_of_unknown_layers_are_left_with_a_reason() -> None:
    net = nn.ModuleList([nn.Linear(3, 3), Matrix(), nn.Embedding(4, 3), nn.Linear(3, 3)])
    net += [nn.ParameterList([torch.ones(8, 4), torch.ones(8)]), nn.Linear(3, 3)]
    net[5].weight_bar = nn.Parameter(net[5]._parameters.pop("weight").detach())
    parametrize.register_parametrization(net[3], "weight", LowRank(), unsafe=True)
    assert [weight.name for weight in find_recorded_weights(net)] == ["0.weight"]
    reasons = {
        "1.weight": "Matrix is not a known layer",
        "1.position": "Matrix is not a known layer",
        "2.weight": "an embedding's rows are not output channels",
        "3.weight": "it is computed from parameters of other shapes",
        "4.0": "ParameterList is not a known layer",
        "5.weight": "it is computed in a way that is not known",
    }
    assert find_left_weights(net) == reasons
    assert find_left_weights(net, exclude=["[1-5].*"]) == {}
    (weight,) = find_recorded_weights(net, ["1.weight"])
    assert weight.channels == 4


def test_channels_of_layers_of_other_packages() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    deformed = pytest.importorskip("torchvision").ops.DeformConv2d
    net = nn.Sequential(conv1d(7, 3), deformed(2, 5, 3), parametrizations.weight_norm(conv1d(6, 2)))
    recorded = {weight.name: weight for weight in find_recorded_weights(net)}
    channels = {name: weight.channels for name, weight in recorded.items()}
    assert channels == {"2.weight": 6, "0.weight": 7, "1.weight": 5, "2.weight_v": 6}
    torch.testing.assert_close(recorded["0.weight"].norms(), net[0].weight.detach().norm(dim=0))
    torch.testing.assert_close(recorded["2.weight"].norms(), net[2].weight.detach().norm(dim=0))


def test_other_weights_by_name_or_once_normalised() -> None:
    net = nn.ModuleDict(
        {
            "embed": nn.Embedding(7, 4),
            "lstm": nn.LSTM(4, 3),
            "attention": nn.MultiheadAttention(4, 2),
            "bilinear": nn.Bilinear(2, 3, 5),
            "out": nn.Linear(4, 7),
        }
    )
    prune.random_unstructured(net["bilinear"], "weight", 0.5)
    net["out"].weight = net["embed"].weight
    names = ["lstm.weight_hh_l0", "attention.in_proj_weight"]
    weights = find_layer_weights(net, names)
    assert [weight.name for weight in weights] == names
    assert [weight.channels for weight in weights] == [12, 12]
    assert [w.name for w in find_layer_weights(net)] == ["attention.out_proj.weight", "out.weight"]
    channels = {w.name: w.channels for w in find_recorded_weights(net)}
    lstm = {"lstm.weight_ih_l0": 12, "lstm.weight_hh_l0": 12, "attention.in_proj_weight": 12}
    others = {"bilinear.weight": 5, "bilinear.weight_v": 5}
    assert channels == {**lstm, **others, "attention.out_proj.weight": 4, "out.weight": 7}
    assert find_left_weights(net) == {}, "the embedding is recorded where it is tied"
    apply_weight_norm(net, include=["lstm.weight_*", "embed.weight", "attention.in_proj_weight"])
    recorded = {weight.name: weight for weight in find_recorded_weights(net)}
    normalised = ["embed.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"]
    normalised.append("attention.in_proj_weight")
    plain = [*others, "attention.out_proj.weight"]
    assert sorted(recorded) == sorted([*normalised, *(f"{n}_v" for n in normalised), *plain])
    exact = channel_norms(net["lstm"].weight_hh_l0)
    torch.testing.assert_close(recorded["lstm.weight_hh_l0"].norms(), exact)
