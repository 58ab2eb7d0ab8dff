"""Attention against `nn.MultiheadAttention` with the same weights."""

import pytest
import torch
from torch import nn

from nmlightning.translation.transformer import Attention
from torch_layers import copy_weights, pair_attention

WIDTH, HEADS = 24, 3


def draw(mask: str) -> dict[str, torch.Tensor]:
    """Return both masks: torch's is True where nothing may be read."""
    if mask == "padding":
        padding = torch.tensor([[False] * 6 + [True], [False] * 3 + [True] * 4])
        return {"ours": ~padding[:, None, None], "theirs": padding}
    return {}


@pytest.mark.parametrize("mask", ["none", "padding", "causal"])
def test_it_is_torchs(mask: str) -> None:
    torch.manual_seed(0)
    ours = Attention(WIDTH, HEADS).double()
    theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
    copy_weights(pair_attention(theirs, ours, "data"))
    memory = torch.randn(2, 7, WIDTH, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 7 if mask == "causal" else 5, WIDTH, dtype=torch.float64, requires_grad=True)
    masks = draw(mask)
    future = torch.ones(7, 7, dtype=torch.bool).triu(1) if mask == "causal" else None
    y = ours(x, memory, masks.get("ours"), is_causal=mask == "causal")
    reference, _ = theirs(x, memory, memory, key_padding_mask=masks.get("theirs"), attn_mask=future)
    torch.testing.assert_close(y, reference)
    upstream = torch.randn_like(y)
    gradients = torch.autograd.grad(y, (x, memory), upstream, retain_graph=True)
    expected = torch.autograd.grad(reference, (x, memory), upstream, retain_graph=True)
    torch.testing.assert_close(gradients, expected)
    y.backward(upstream)
    reference.backward(upstream)
    for their_gradient, gradient in pair_attention(theirs, ours, "grad"):
        torch.testing.assert_close(gradient, their_gradient)


def test_it_starts_as_in_torchs_transformer() -> None:
    torch.manual_seed(0)
    whole = nn.Transformer(256, 8, 1, 1, 8, batch_first=True)
    theirs, ours = whole.encoder.layers[0].self_attn, Attention(256, 8)
    for their_weight, weight in pair_attention(theirs, ours, "data"):  # type: ignore[arg-type]
        # 65,536 samples of a uniform distribution: its standard deviation to 0.2 %.
        assert weight.std().item() == pytest.approx(their_weight.std().item(), rel=0.02)
