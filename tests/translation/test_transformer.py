"""Transformer against the same network of torch's layers, its published size, and its options."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch_transformer import TorchTransformer

from nmlightning import apply_weight_norm
from nmlightning.errors import InputError
from nmlightning.translation.transformer import Transformer, sinusoids
from torch_layers import copy_weights, pair_networks

SMALL = {"width": 24, "hidden": 40, "heads": 3}
SOURCE = torch.tensor([[5, 6, 7, 8, 2], [9, 4, 2, 0, 0]])
TARGET = torch.tensor([[1, 6, 7, 8, 9, 2], [1, 5, 4, 2, 0, 0]])


def make(layers: int = 2, **options: Any) -> Transformer:
    settings = {**SMALL, "dropout": 0.0, **options}
    return Transformer(11, encoder_layers=layers, decoder_layers=layers, **settings)


@pytest.mark.parametrize("norm_first", [False, True])
def test_it_is_the_network_of_torchs_layers(norm_first: bool) -> None:
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


def test_the_base_model_has_the_published_size() -> None:
    with torch.device("meta"):
        net = Transformer(37_000)
        size = sum(q.numel() for q in net.parameters())
    assert size / 1e6 == pytest.approx(65, rel=0.05)  # table 3 of the paper, without digits
    assert (net.width, len(net.encoder), len(net.decoder)) == (512, 6, 6)
    assert sum(isinstance(module, nn.LayerNorm) for module in net.modules()) == 6 * 2 + 6 * 3


def test_positions_are_the_papers_formula() -> None:
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
def test_what_is_tied_is_one_parameter(tied: Any, own: list[str]) -> None:
    net = make(tied=tied)
    words = dict(net.words.named_parameters())
    assert list(words) == ["target.weight", *(f"own_{name}.weight" for name in own)]
    assert len(net.state_dict()) == len(list(net.parameters()))
    net(SOURCE, TARGET).logsumexp(2).sum().backward()
    assert all(q.grad is not None and q.grad.any() for q in words.values())


def test_a_weight_norm_of_the_embedding_counts_for_the_output() -> None:
    net = make()
    apply_weight_norm(net, include=["words.*"], rho=0.5)
    torch.testing.assert_close(net.words.target.weight.norm(dim=1), torch.full((11,), 0.5))
    x = torch.randn(1, 24)
    torch.testing.assert_close(net.words.logits(x), x @ net.words.target.weight.T)


@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_norms_and_where_they_stand(norm: Any, norm_first: bool) -> None:
    kind = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}.get(norm)
    net = make(norm=norm, norm_first=norm_first)
    norms = [m for m in net.modules() if "Norm" in type(m).__name__]
    assert {type(module) for module in norms} == ({kind} if kind else set())
    assert len(norms) == (2 * 2 + 2 * 3 + 2 * norm_first if kind else 0)


def test_scaled_branches_add_up_to_one() -> None:
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
def test_it_starts_without_norms(bounded: bool) -> None:
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


def test_an_output_of_its_own_starts_at_the_vocabulary_without_norms() -> None:
    torch.manual_seed(0)
    source, target = torch.randint(4, 400, (2, 8, 20))
    losses = []
    for tied in ("all", "inputs"):
        net = Transformer(400, 256, 256, 4, 3, 3, norm="none", scale_branches=True, tied=tied)  # type: ignore[arg-type]
        logits = net(source, target[:, :-1]).flatten(0, 1)
        losses.append(F.cross_entropy(logits, target[:, 1:].flatten()).item())
    assert losses[0] == pytest.approx(16, rel=0.1)
    assert losses[1] == pytest.approx(math.log(400) + 1, rel=0.1)


def test_reset_draws_all_anew_as_at_first() -> None:
    torch.manual_seed(0)
    net = make(scale_branches=True)
    first = copy.deepcopy(net.state_dict())
    for q in net.parameters():
        nn.init.constant_(q, 7.0)
    net.reset_parameters()
    for name, weight in net.state_dict().items():
        assert not (weight == 7).any()
        assert weight.std().item() == pytest.approx(first[name].std().item(), rel=0.3), name


def test_compiles_whole() -> None:
    torch.manual_seed(0)
    net = make()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(SOURCE, TARGET), net(SOURCE, TARGET))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 25}, r"width must be even and a multiple of heads, got 25 with 3 heads"),
        ({"width": 26}, r"multiple of heads, got 26 with 3"),
        ({"width": 0}, r"width must be a whole number of at least 1, got 0"),
        ({"hidden": 0}, r"hidden must be a whole number"),
        ({"heads": 0}, r"heads must be a whole number"),
        ({"layers": 0}, r"encoder_layers must be a whole number of at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be at least 0 and less than 1, got 1\.0"),
        ({"dropout": "0.1"}, r"dropout must be at least 0 and less than 1, got '0\.1'"),
        ({"norm": "batch"}, r"norm is 'layer' or 'rms' or 'none', got 'batch'"),
        ({"norm_first": "no"}, r"norm_first is True or False, got 'no'"),
        (
            {"tied": "al"},
            r"tied is 'all' or 'inputs' or 'output' or 'none', got 'al'\. Did you mean 'all'",
        ),
        ({"scale_branches": 2}, r"scale_branches is True or False, got 2"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**options)


def test_a_vocabulary_has_words() -> None:
    with pytest.raises(InputError, match="vocab_size must be a whole number of at least 5, got 4"):
        Transformer(4)
