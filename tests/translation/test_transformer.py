"""Transformer, its layers and attention against torch's, its published size, and its options."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from translation_rivals import TorchTransformer

from nmlightning import apply_weight_norm
from nmlightning.errors import InputError
from nmlightning.translation.transformer import (
    Attention,
    DecoderLayer,
    EncoderLayer,
    LayerSizes,
    Transformer,
    sinusoids,
)

Pair = tuple[Tensor, Tensor]  # torch's and ours; the former is a view of the parameter


def copy_weights(pairs: Iterator[Pair]) -> None:
    """Copy torch's to ours, after making them less plain: no zeros, no ones."""
    with torch.no_grad():
        for theirs, ours in pairs:
            theirs += 0.1 * torch.randn_like(theirs)
            ours.copy_(theirs)


def pair_attention(theirs: nn.MultiheadAttention, ours: Attention, of: str) -> Iterator[Pair]:
    """Yield those of an attention, their `data` or their `grad`."""
    parts = (ours.query, ours.key, ours.value)
    weights = getattr(theirs.in_proj_weight, of).chunk(3)
    biases = getattr(theirs.in_proj_bias, of).chunk(3)
    for part, weight, bias in zip(parts, weights, biases, strict=True):
        yield weight, getattr(part.weight, of)
        yield bias, getattr(part.bias, of)
    yield from pair_plain(theirs.out_proj, ours.out, of)


def pair_plain(theirs: Any, ours: Any, of: str) -> Iterator[Pair]:
    """Yield weight and bias of a linear layer or a norm."""
    yield getattr(theirs.weight, of), getattr(ours.weight, of)
    yield getattr(theirs.bias, of), getattr(ours.bias, of)


def pair_layer(theirs: Any, ours: EncoderLayer | DecoderLayer, of: str) -> Iterator[Pair]:
    yield from pair_attention(theirs.self_attn, ours.attention, of)
    sums = [ours.attention_sum, ours.feed_forward_sum]
    if isinstance(ours, DecoderLayer):
        yield from pair_attention(theirs.multihead_attn, ours.source_attention, of)
        sums.insert(1, ours.source_attention_sum)
    for number, own in enumerate(sums, 1):
        yield from pair_plain(getattr(theirs, f"norm{number}"), own.norm, of)
    yield from pair_plain(theirs.linear1, ours.feed_forward.inner, of)
    yield from pair_plain(theirs.linear2, ours.feed_forward.outer, of)


def pair_networks(theirs: Any, ours: Any, of: str) -> Iterator[Pair]:
    """Yield those of a `TorchTransformer` and a `Transformer`."""
    yield getattr(theirs.embedding.weight, of), getattr(ours.words.target.weight, of)
    for stack, layers, norm in (
        (theirs.encoder, ours.encoder, ours.encoder_norm),
        (theirs.decoder, ours.decoder, ours.decoder_norm),
    ):
        for their_layer, layer in zip(stack.layers, layers, strict=True):
            yield from pair_layer(their_layer, layer, of)
        if stack.norm is not None:
            yield from pair_plain(stack.norm, norm, of)


def test_attention_is_initialised_as_in_torchs_transformer() -> None:
    torch.manual_seed(0)
    whole = nn.Transformer(256, 8, 1, 1, 8, batch_first=True)
    theirs, ours = whole.encoder.layers[0].self_attn, Attention(256, 8)
    for their_weight, weight in pair_attention(theirs, ours, "data"):  # type: ignore[arg-type]
        # 65,536 samples of a uniform distribution: its standard deviation to 0.2 %.
        assert weight.std().item() == pytest.approx(their_weight.std().item(), rel=0.02)


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer_drops_out_its_branches(norm_first: bool) -> None:
    """With nearly all of it dropped, nothing but x (and the norm after it) is left."""
    torch.manual_seed(0)
    sizes = LayerSizes(**SMALL, dropout=1 - 1e-9, norm="layer", norm_first=norm_first)
    x = torch.randn(2, 7, 24)
    y = EncoderLayer(sizes)(x, None)
    once = torch.nn.functional.layer_norm(x, (24,))
    expected = x if norm_first else torch.nn.functional.layer_norm(once, (24,))
    torch.testing.assert_close(y, expected)


SMALL = {"width": 24, "hidden": 40, "heads": 3}

SOURCE = torch.tensor([[5, 6, 7, 8, 2], [9, 4, 2, 0, 0]])

TARGET = torch.tensor([[1, 6, 7, 8, 9, 2], [1, 5, 4, 2, 0, 0]])


def make(layers: int = 2, **options: Any) -> Transformer:
    settings = {"vocab_size": 11, **SMALL, "dropout": 0.0, **options}
    return Transformer(encoder_layers=layers, decoder_layers=layers, **settings)


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_equals_torchs_layers(norm_first: bool) -> None:
    torch.manual_seed(0)
    ours = make(norm_first=norm_first).double()
    theirs = TorchTransformer(11, **SMALL, layers=2, dropout=0.0, norm_first=norm_first).double()
    copy_weights(pair_networks(theirs, ours, "data"))
    logits = [net(SOURCE, TARGET[:, :-1]) for net in (ours, theirs)]
    # The sinusoids of both are float32.
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-6, atol=1e-6)
    for each in logits:
        F.cross_entropy(each.flatten(0, 1), TARGET[:, 1:].flatten(), ignore_index=0).backward()
    pairs = list(pair_networks(theirs, ours, "grad"))
    assert len(pairs) == len(list(ours.parameters()))
    for their_gradient, gradient in pairs:
        torch.testing.assert_close(gradient, their_gradient, rtol=1e-5, atol=1e-6)


def test_transformer_base_model_has_the_published_size() -> None:
    with torch.device("meta"):
        net = Transformer(37_000)
        size = sum(q.numel() for q in net.parameters())
    assert size / 1e6 == pytest.approx(65, rel=0.05)  # table 3 of the paper, without digits
    assert (net.width, len(net.encoder), len(net.decoder)) == (512, 6, 6)
    assert sum(isinstance(module, nn.LayerNorm) for module in net.modules()) == 6 * 2 + 6 * 3


def test_sinusoids_equal_the_papers_formula() -> None:
    found = sinusoids(3, 90, 10, torch.device("cpu"))
    for t in range(3, 90):
        for i in range(5):
            angle = t / 10_000 ** (2 * i / 10)
            pair = torch.tensor([math.sin(angle), math.cos(angle)])
            # An angle of up to 90 in float32 is wrong by up to 4e-6.
            torch.testing.assert_close(found[t - 3, 2 * i : 2 * i + 2], pair, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("tied", "own"),
    [("all", []), ("inputs", ["output"]), ("output", ["source"]), ("none", ["source", "output"])],
)
def test_tied_embedding_is_one_parameter(tied: Any, own: list[str]) -> None:
    net = make(tied=tied)
    words = dict(net.words.named_parameters())
    assert list(words) == ["target.weight", *(f"own_{name}.weight" for name in own)]
    assert len(net.state_dict()) == len(list(net.parameters()))
    net(SOURCE, TARGET).logsumexp(2).sum().backward()
    assert all(q.grad is not None and q.grad.any() for q in words.values())


def test_tied_embedding_weight_norm_counts_for_the_output() -> None:
    net = make()
    apply_weight_norm(net, include=["words.*"], rho=0.5)
    torch.testing.assert_close(net.words.target.weight.norm(dim=1), torch.full((11,), 0.5))
    x = torch.randn(1, 24)
    torch.testing.assert_close(net.words.logits(x), x @ net.words.target.weight.T)


@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_has_its_norms(norm: Any, norm_first: bool) -> None:
    kind = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}.get(norm)
    net = make(norm=norm, norm_first=norm_first)
    norms = [m for m in net.modules() if "Norm" in type(m).__name__]
    assert {type(module) for module in norms} == ({kind} if kind else set())
    assert len(norms) == (2 * 2 + 2 * 3 + 2 * norm_first if kind else 0)
    assert all(module.eps == 1e-5 for module in norms)


def test_transformer_scales_its_branches() -> None:
    nets = []
    for scale_branches in (False, True):
        torch.manual_seed(0)
        nets.append(make(scale_branches=scale_branches).state_dict())
    branches = {"encoder": 2 * 2, "decoder": 2 * 3}
    for name, weight in nets[0].items():
        is_last = name.endswith(("ttention.out.weight", "feed_forward.outer.weight"))
        factor = branches[name.split(".")[0]] ** -0.5 if is_last else 1
        torch.testing.assert_close(nets[1][name], weight * factor, msg=name)


@pytest.mark.parametrize("bounded", [False, True])
def test_transformer_trains_without_norms(bounded: bool) -> None:
    """With scaled branches it learns to write backwards; unscaled, the logits are huge."""
    torch.manual_seed(0)
    sizes = [
        make(6, norm="none", scale_branches=scaled)(SOURCE, TARGET).std()
        for scaled in (False, True)
    ]
    assert sizes[0] > 5 * sizes[1]
    net = make(3, norm="none", scale_branches=True)
    if bounded:
        apply_weight_norm(net, include=["encoder.*", "decoder.*"])
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.9, 0.98))
    for _ in range(60):
        source = torch.randint(4, 11, (16, 4))
        target = F.pad(source.flip(1), (1, 0), value=1)
        loss = F.cross_entropy(net(source, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < math.log(7) - 0.1  # what is known without the source


def test_transformer_initial_loss_depends_on_the_tied_output() -> None:
    torch.manual_seed(0)
    source, target = torch.randint(4, 400, (2, 8, 20))
    losses = []
    for tied in ("all", "inputs"):
        net = Transformer(400, 256, 256, 4, 3, 3, norm="none", scale_branches=True, tied=tied)  # type: ignore[arg-type]
        logits = net(source, target[:, :-1]).flatten(0, 1)
        losses.append(F.cross_entropy(logits, target[:, 1:].flatten()).item())
    assert losses[0] == pytest.approx(16, rel=0.1)
    assert losses[1] == pytest.approx(math.log(400) + 1, rel=0.1)


def test_transformer_compiles_whole() -> None:
    torch.manual_seed(0)
    net = make()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(SOURCE, TARGET), net(SOURCE, TARGET))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 4}, r"vocab_size must be a whole number of at least 5, got 4"),
        ({"width": 27}, r"width must be even and a multiple of heads, got 27 with 3 heads"),
        ({"width": 26}, r"multiple of heads, got 26 with 3"),
        ({"width": 0}, r"width must be a whole number of at least 1, got 0"),
        ({"heads": 0}, r"heads must be a whole number"),
        ({"layers": 0}, r"encoder_layers must be a whole number of at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be at least 0 and less than 1, got 1\.0"),
        ({"dropout": "0.1"}, r"dropout must be at least 0 and less than 1, got '0\.1'"),
        ({"norm": "batch"}, r"norm is 'layer' or 'rms' or 'none', got 'batch'"),
        ({"norm_first": "no"}, r"norm_first is True or False, got 'no'"),
        ({"tied": "al"}, r"tied is 'all' or 'inputs' or 'output' or 'none', got 'al'\. Did you"),
        ({"scale_branches": 2}, r"scale_branches is True or False, got 2"),
    ],
)
def test_transformer_refuses_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**options)
