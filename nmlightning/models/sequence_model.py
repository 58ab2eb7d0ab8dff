"""What a network offers that translates token by token."""

from typing import Protocol, TypeVar

import torch
from torch import Tensor

from nmlightning.errors import InputError, check_whole_number
from nmlightning.text.special_tokens import BOS, PAD


class DecoderState(Protocol):
    """What it knows between two tokens; a row for each translation that is being written."""

    def select(self, rows: Tensor) -> None:
        """Keep these rows, (M,) int64, in this order; any may be left out or repeated."""


State = TypeVar("State", bound=DecoderState)


class SequenceModel(Protocol[State]):
    """`Transformer`, `AttentionLSTM`, or a network of the same interface."""

    vocab_size: int
    training: bool

    def begin(self, source: Tensor) -> State:
        """Encode (N, S) source tokens."""

    def next_logits(self, tokens: Tensor, state: State) -> Tensor:
        """Write (N,) tokens, BOS at first, and return (N, vocab_size) logits of those to follow."""


def longest_translations(net: SequenceModel[State], source: Tensor, extra_length: int) -> Tensor:
    """Return how many tokens each translation may have, (N,) int64: `extra_length` more than it.

    Padding does not count.

    Raises:
        InputError: for a net in training mode, whose dropout would be searched as well, for a
            source that is not (N, S) int64 or has a sentence without a token, and for an
            `extra_length` that is no whole number.
    """
    name = type(net).__name__
    check_whole_number("extra_length", extra_length, least=0)
    if net.training:
        raise InputError(f"{name} is in training mode, with dropout: call its eval() to search.")
    if source.dim() != 2 or source.dtype != torch.int64:
        raise InputError(
            f"source is (N, S) tokens of int64, got {tuple(source.shape)} of {source.dtype}."
        )
    lengths = (source != PAD).sum(1)
    empty = (lengths == 0).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"source has no token but padding in row {empty[0]}: end it with EOS.")
    return lengths + extra_length


def rule_out(logits: Tensor) -> Tensor:
    """Return (N, vocab_size) logits in float32, without a chance for PAD and BOS.

    Those of a network that has diverged become finite, so that PAD and BOS are less likely still.
    """
    allowed = logits.float().nan_to_num(nan=torch.finfo(torch.float32).min)
    allowed[:, [PAD, BOS]] = -torch.inf
    return allowed
