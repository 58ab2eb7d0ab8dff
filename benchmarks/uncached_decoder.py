"""Decoding without a cache: the whole decoder runs anew for each token."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Prefixes:
    """A state that knows nothing but the tokens: (N, S) source and (N, t) target."""

    source: Tensor
    target: Tensor

    def select(self, rows: Tensor) -> None:
        """Keep these rows, (M,) int64."""
        self.source, self.target = self.source[rows], self.target[rows]


class UncachedDecoder(nn.Module):
    """A sequence model that offers what searches ask for by the forward of `net` alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.vocab_size: int = net.vocab_size  # type: ignore[assignment]

    def begin(self, source: Tensor) -> Prefixes:
        """Keep the source."""
        return Prefixes(source, source.new_empty(len(source), 0))

    def next_logits(self, tokens: Tensor, state: Prefixes) -> Tensor:
        """Run over all tokens so far, (N,) the new ones, and return the last logits."""
        state.target = torch.cat((state.target, tokens[:, None]), 1)
        logits: Tensor = self.net(state.source, state.target)[:, -1]
        return logits
