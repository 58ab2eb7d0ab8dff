"""The layers against torch's with the same weights, and what stands at their ends."""

from typing import Any

import pytest
import torch
from torch import nn

from nmlightning.translation.transformer import DecoderLayer, EncoderLayer, LayerSizes, make_norm
from torch_layers import copy_weights, pair_layer

SIZES = {"width": 24, "hidden": 40, "heads": 3}
SOURCE_PADDING = torch.tensor([[False] * 7, [False] * 3 + [True] * 4])
FUTURE = torch.ones(5, 5, dtype=torch.bool).triu(1)


def make(layer: type, norm_first: bool) -> tuple[Any, Any]:
    """Return ours and torch's, with the same weights, in float64 without dropout."""
    torch.manual_seed(0)
    ours = layer(LayerSizes(**SIZES, dropout=0.0, norm="layer", norm_first=norm_first)).double()
    kind = nn.TransformerEncoderLayer if layer is EncoderLayer else nn.TransformerDecoderLayer
    theirs = kind(24, 3, 40, dropout=0.0, batch_first=True, norm_first=norm_first).double()
    copy_weights(pair_layer(theirs, ours, "data"))
    return ours, theirs


def compare(ours: Any, theirs: Any, y: torch.Tensor, reference: torch.Tensor) -> None:
    """Compare outputs and the gradients of all parameters."""
    torch.testing.assert_close(y, reference)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    reference.backward(upstream)
    pairs = list(pair_layer(theirs, ours, "grad"))
    assert len(pairs) == len(list(ours.parameters()))
    for their_gradient, gradient in pairs:
        torch.testing.assert_close(gradient, their_gradient)


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer_is_torchs(norm_first: bool) -> None:
    ours, theirs = make(EncoderLayer, norm_first)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    y = ours(x, ~SOURCE_PADDING[:, None, None])
    compare(ours, theirs, y, theirs(x, src_key_padding_mask=SOURCE_PADDING))


@pytest.mark.parametrize("norm_first", [False, True])
def test_decoder_layer_is_torchs(norm_first: bool) -> None:
    ours, theirs = make(DecoderLayer, norm_first)
    x, memory = (torch.randn(2, n, 24, dtype=torch.float64) for n in (5, 7))
    reference = theirs(
        x, memory, tgt_mask=FUTURE, memory_key_padding_mask=SOURCE_PADDING, tgt_is_causal=True
    )
    compare(ours, theirs, ours(x, memory, ~SOURCE_PADDING[:, None, None]), reference)


@pytest.mark.parametrize("norm_first", [False, True])
def test_dropout_is_on_what_a_branch_returns(norm_first: bool) -> None:
    """With nearly all of it dropped, nothing but x (and the norm after it) is left."""
    torch.manual_seed(0)
    sizes = LayerSizes(**SIZES, dropout=1 - 1e-9, norm="layer", norm_first=norm_first)
    x = torch.randn(2, 7, 24)
    y = EncoderLayer(sizes)(x, None)
    once = torch.nn.functional.layer_norm(x, (24,))
    expected = x if norm_first else torch.nn.functional.layer_norm(once, (24,))
    torch.testing.assert_close(y, expected)


def test_norms_are_torchs_own() -> None:
    assert repr(make_norm("layer", 8)) == repr(nn.LayerNorm(8))
    assert repr(make_norm("rms", 8)) == repr(nn.RMSNorm(8, eps=1e-5))
    assert list(make_norm("none", 8).parameters()) == []
