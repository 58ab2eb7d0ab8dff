"""Test which weights are normalised by the kind of their layer, in sequence models."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from nmlightning import (
    InputError,
    apply_weight_norm,
    channel_norms,
    parameter_groups,
    remove_weight_norm,
)
from nmlightning.parametrizations import WeightNorm

ALL = ("linear", "recurrent", "embedding")
WORDS, WIDTH = 11, 8


class Translator(nn.Module):
    """An encoder and decoder of torch's own layers, its output layer tied or not."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        self.encoder = nn.LSTM(WIDTH, WIDTH, 2, batch_first=True, bidirectional=True)
        self.enter = nn.Linear(2 * WIDTH, WIDTH)
        layer = nn.TransformerDecoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)
        self.output = nn.Linear(WIDTH, WORDS)
        if tied:
            self.output.weight = self.words.weight

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.enter(self.encoder(self.words(source))[0])
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        x = self.decoder(self.words(target), memory, tgt_mask=mask, tgt_is_causal=True)
        return self.output(x)


class TiedByFunction(nn.Module):
    """Its output layer is no module; it names the layer as Hugging Face's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)

    def get_output_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.hidden(self.words(x)), self.words.weight)


def sentences() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(1, WORDS, (3, 5), generator=generator)
    source[0, 3:] = 0
    return source, torch.randint(1, WORDS, (3, 4), generator=generator)


def matrices(net: nn.Module) -> set[str]:
    return {name for name, q in net.named_parameters() if q.dim() == 2}


def train(net: nn.Module, steps: int, **settings: Any) -> None:
    optimizer = torch.optim.Adam(net.parameters(), 0.01, **settings)
    for _ in range(steps):
        optimizer.zero_grad()
        net(*sentences()).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("layers", "pattern"),
    [
        (["linear"], ("enter", "decoder")),
        (["recurrent"], ("encoder",)),
        (["embedding"], ("words",)),
        (["embedding", "linear"], ("words", "enter", "decoder")),
    ],
)
def test_layers_leave_the_output_layer_out(layers: list[Any], pattern: tuple[str, ...]) -> None:
    net = Translator()
    expected = {name for name in matrices(net) if name.startswith(pattern)}
    report = apply_weight_norm(net, layers=layers)
    assert set(report.weights) == expected
    assert report.left == (("output.weight",) if "linear" in layers else ())
    assert ("not on the output layer, output.weight" in str(report)) == bool(report.left)


def test_layers_count_attention_projections_as_linear() -> None:
    for widths, count in (({}, 2), ({"kdim": 6, "vdim": 4}, 4)):
        layer = nn.MultiheadAttention(WIDTH, 2, **widths)
        assert len(apply_weight_norm(layer, layers=["linear"]).weights) == count


def test_layers_know_recurrent_layers_and_cells() -> None:
    layers = nn.ModuleList([nn.LSTM(4, 6, proj_size=3), nn.GRUCell(4, 6), nn.RNN(4, 6)])
    expected = matrices(layers)
    weights = apply_weight_norm(layers, layers=["recurrent"]).weights
    assert set(weights) == expected
    assert len(weights) == 3 + 2 + 2
    rows = channel_norms(layers[1].weight_ih)
    torch.testing.assert_close(rows, torch.full((18,), weights["1.weight_ih"]))


def test_include_adds_the_output_layer() -> None:
    net = Translator()
    expected = matrices(net)
    report = apply_weight_norm(net, layers=ALL, include=["output.weight"])
    assert (set(report.weights), report.left) == (expected, ())


@pytest.mark.parametrize("include", [[], ["output.weight"], ["words.weight"]])
def test_tied_output_layer_is_left_or_normalised_once(include: list[str]) -> None:
    net = Translator(tied=True)
    report = apply_weight_norm(net, layers=ALL, include=include)
    assert ("words.weight" in report.weights) == bool(include)
    assert report.left == (() if include else ("words.weight", "output.weight"))
    if not include:
        assert str(report).endswith("on the output layer, words.weight = output.weight")
    train(net, 3)
    assert torch.equal(net.words.weight, net.output.weight)
    remove_weight_norm(net)
    assert net.words.weight is net.output.weight


def test_output_layer_may_be_named_by_get_output_embeddings() -> None:
    net = TiedByFunction()
    assert apply_weight_norm(net, layers=ALL).left == ("words.weight",)
    decayed = parameter_groups(net, 0.1, "last_layer")[0]["params"]
    assert [q is net.words.weight for q in decayed] == [True]


@pytest.mark.parametrize("kind", ["bounded", "weight"])
def test_padding_row_stays_zero(kind: Any) -> None:
    net = Translator()
    apply_weight_norm(net, kind, layers=ALL, project=True)
    train(net, 3, weight_decay=0.1)
    norms = channel_norms(net.words.weight)
    assert norms[0] == 0
    assert (norms[1:] > 0.1).all()
    assert all(q.isfinite().all() for q in net.parameters())


@pytest.mark.parametrize("after_training", [False, True])
def test_deepcopy_computes_the_same_and_is_independent(after_training: bool) -> None:
    net = Translator()
    apply_weight_norm(net, layers=ALL)
    train(net, 2)
    if not after_training:
        net.eval()
    output = net(*sentences())
    averaged = torch.optim.swa_utils.AveragedModel(net)
    averaged.update_parameters(net)
    torch.testing.assert_close(averaged(*sentences()), output)
    train(net, 1)
    torch.testing.assert_close(averaged(*sentences()), output)
    assert (net(*sentences()) - output).abs().max() > 1e-3


@pytest.mark.parametrize("tied", [False, True])
def test_remove_leaves_a_plain_model_with_the_same_output(tied: bool) -> None:
    net = Translator(tied)
    apply_weight_norm(net, layers=ALL, include=["output.weight"])
    train(net, 2)
    expected = net.eval()(*sentences())
    remove_weight_norm(net)
    assert torch.equal(net(*sentences()), expected)
    assert [type(m) for m in net.modules()] == [type(m) for m in Translator(tied).modules()]
    plain = Translator(tied).eval()
    plain.load_state_dict(net.state_dict())
    assert torch.equal(plain(*sentences()), expected)
    assert torch.equal(copy.deepcopy(net)(*sentences()), expected)


class Matrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, 2))


def test_channels_of_layers_of_other_packages() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    net = nn.Sequential(conv1d(96, 32), nn.ReLU(), conv1d(32, 96), nn.Linear(32, 2), Matrix())
    x = torch.randn(2, 32)
    expected = net[:4](x)
    report = apply_weight_norm(net, "weight", layers=["linear"])
    gains = [norm.gain.numel() for norm in net.modules() if isinstance(norm, WeightNorm)]
    assert gains == [96, 32], "outputs, not inputs"
    assert (report.left, report.unknown) == (("3.weight",), {"4.w": "Matrix"})
    line = "not on 4.w (Matrix), whose class is not known: name layers by include"
    assert line in str(report)
    torch.testing.assert_close(net[:4](x), expected)
    remove_weight_norm(net)
    named = apply_weight_norm(net, include=["0.weight", "4.w"])
    assert (named.unknown, named.assumed) == ({}, {"4.w": "Matrix"})
    line = "along dimension 0 of 4.w (Matrix), whose class is not known"
    assert line in str(named)


def test_linear_layers_that_the_default_passes_over_are_said() -> None:
    blocks = [nn.Linear(4, 4) for _ in range(3)]
    with pytest.warns(
        UserWarning, match="1 weights of convolutions .* none of its 2 linear layers"
    ):
        report = apply_weight_norm(nn.Sequential(nn.Conv2d(3, 4, 2), *blocks))
    assert "on 1 weight; not on 2 of linear layers (add them by layers)" in str(report)


def test_output_layer_in_doubt_is_said_once_and_by_name_settled() -> None:
    def make() -> nn.Module:
        return nn.ModuleDict(
            {"a": nn.Linear(3, 6), "image_head": nn.Linear(6, 4), "text_head": nn.Linear(5, 4)}
        )

    with pytest.warns(UserWarning, match="; image_head.weight, text_head.weight are left out: c"):
        report = apply_weight_norm(make(), layers=["linear"])
    assert report.left == ("image_head.weight", "text_head.weight")
    assert "on the output layer, image_head.weight and text_head.weight" in str(report)
    for names in ({"include": ["*_head.weight"]}, {"exclude": ["*_head.weight"]}):
        assert not apply_weight_norm(make(), layers=["linear"], **names).left


class Heads(nn.Module):
    """Of convolutions, as FCN; of linear layers, as GoogLeNet; or named in part, as BERT's."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "conv":
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
            self.main = nn.Sequential(nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1))
            self.aux = nn.Sequential(nn.Conv2d(8, 5, 1), nn.Conv2d(5, 4, 1))
        elif kind == "linear":
            self.body = nn.Sequential(nn.Linear(3, 8))
            self.aux = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 4))
            self.more, self.fc = nn.Sequential(nn.Conv2d(8, 8, 1)), nn.Linear(8, 4)
        else:
            self.main, self.fc = nn.Linear(3, 8), nn.Linear(3, 2)
            self.get_output_embeddings = lambda: self.main


@pytest.mark.parametrize(
    ("kind", "doubt", "left"),
    [
        (
            "conv",
            r"Heads has no nn.Linear, and maybe aux.1, main.1 give its output; nothing is",
            (),
        ),
        ("linear", r"fc is its last, and aux.1 beside it", ("aux.1.weight", "fc.weight")),
        ("named", r"beside main, fc may give an output, too; main", ("main.weight",)),
    ],
)
def test_other_outputs_are_said(kind: str, doubt: str, left: tuple[str, ...]) -> None:
    with pytest.warns(UserWarning, match=doubt):
        report = apply_weight_norm(Heads(kind), layers=["conv", "linear"])
    assert report.left == left


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["0.weight", "0.weight_g"])
def test_computed_weight_is_excluded_by_its_name_or_a_part_of_it(name: str) -> None:
    net = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(2, 4, 1)), nn.Conv2d(4, 4, 1), nn.ReLU())
    net.append(nn.BatchNorm2d(4))
    assert [*apply_weight_norm(net, exclude=[name]).weights] == ["1.weight"]


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Translator, {"layers": ["lstm"]}, "layers is 'conv' or 'linear' or .* got 'lstm'"),
        (Translator, {"layers": "linear"}, "layers is a list, got the string 'linear'"),
        (Translator, {"layers": []}, "layers is empty: name conv, linear, recurrent, embedding"),
        (Translator, {}, r"layers is \['conv'\]; choose others, or name weights"),
        (
            lambda: nn.Sequential(nn.Linear(3, 2)),
            {"layers": ["linear"]},
            r"0.weight is of the output layer \(add it by include\)",
        ),
        (
            lambda: prune.random_unstructured(nn.LSTM(3, 2), "weight_hh_l0", 0.5),
            {"layers": ["recurrent"]},
            "weight_hh_l0 is computed from weight_hh_l0_orig",
        ),
    ],
)
def test_layers_refuse(
    make: Callable[[], nn.Module], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        apply_weight_norm(make(), **options)
