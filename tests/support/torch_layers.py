"""Pairs of parameters of torch's Transformer layers and of ours, for copying and for comparing."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nmlightning.translation.transformer import Attention, DecoderLayer, EncoderLayer

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
    """Yield those of a layer."""
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
