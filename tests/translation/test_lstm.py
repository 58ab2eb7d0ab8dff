"""AttentionLSTM against the equations, written as a loop over tokens, and its options."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nmlightning.errors import InputError
from nmlightning.translation.lstm import AttentionLSTM, RecurrentLayer

SOURCE = torch.tensor([[5, 6, 7, 8, 2], [9, 4, 2, 0, 0]])
TARGET = torch.tensor([[1, 6, 7, 8, 9], [1, 5, 4, 2, 0]])


def run(layer: RecurrentLayer, inputs: list[Tensor]) -> list[Tensor]:
    """Return the outputs of a layer for one sentence, a (inputs,) vector for each token."""
    lstm, outputs = layer.lstm, []
    h = c = torch.zeros(lstm.hidden_size, dtype=torch.float64)
    for x in inputs:
        gates = lstm.weight_ih_l0 @ x + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ h + lstm.bias_hh_l0
        i, f, g, o = gates.chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    if isinstance(layer.norm, nn.Identity):
        return outputs
    return [
        (h - h.mean()) / (h.var(unbiased=False) + 1e-5).sqrt() * layer.norm.weight + layer.norm.bias
        for h in outputs
    ]


def translate(net: AttentionLSTM, source: Tensor, target: Tensor) -> Tensor:
    """Return the logits for one sentence without padding."""
    e = net.words.target.weight
    width = e.shape[1]
    vectors = [e[token] * math.sqrt(width) for token in source]
    back = run(net.backwards, vectors[::-1])[::-1]
    x = [torch.cat(both) for both in zip(run(net.forwards, vectors), back, strict=True)]
    for number, layer in enumerate(net.encoder):
        y = run(layer, x)
        x = y if number == 0 else [a + b for a, b in zip(x, y, strict=True)]
    memory = torch.stack(x)
    x = run(net.first_decoder, [e[token] * math.sqrt(width) for token in target])
    contexts = []
    for query in x:
        scores = memory @ net.query.weight @ query / math.sqrt(width)
        contexts.append(scores.softmax(0) @ memory)
    for number, layer in enumerate(net.decoder):
        y = run(layer, [torch.cat(both) for both in zip(x, contexts, strict=True)])
        x = y if number == 0 else [a + b for a, b in zip(x, y, strict=True)]
    return torch.stack(x) @ e.T


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("layers", [2, 4])
def test_lstm_equals_the_equations(layers: int, layer_norm: bool) -> None:
    torch.manual_seed(0)
    net = AttentionLSTM(11, 8, layers, dropout=0.0, layer_norm=layer_norm).double()
    for q in net.parameters():
        nn.init.normal_(q, std=0.5)
    logits = net(SOURCE, TARGET)
    loop = [translate(net, SOURCE[0], TARGET[0]), translate(net, SOURCE[1, :3], TARGET[1, :4])]
    upstream = torch.randn_like(logits)
    upstream[1, 4:] = 0
    torch.testing.assert_close(logits[0], loop[0])
    torch.testing.assert_close(logits[1, :4], loop[1])
    parameters = list(net.parameters())
    expected = torch.autograd.grad(loop, parameters, [upstream[0], upstream[1, :4]])
    torch.testing.assert_close(torch.autograd.grad(logits, parameters, upstream), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 1}, r"layers must be a whole number of at least 2, got 1"),
        ({"width": 0}, r"width must be a whole number of at least 1, got 0"),
        ({"dropout": -0.1}, r"dropout must be at least 0 and less than 1, got -0\.1"),
        ({"layer_norm": "l1"}, r"layer_norm is True or False, got 'l1'"),
        ({"tied": True}, r"tied is 'all' or 'inputs' or 'output' or 'none', got True"),
        ({"vocab_size": 3}, r"vocab_size must be a whole number of at least 5, got 3"),
    ],
)
def test_lstm_refuses_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AttentionLSTM(**{"vocab_size": 11, **options})
