"""Decoding without a cache: the decoder runs over all tokens anew for each one."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Prefixes:
    """A state that keeps no work of the decoder.

    `encoded` is what `encode` has returned for the source, (N, …) each; `target` is (N, t).
    """

    encoded: list[Tensor]
    target: Tensor

    def select(self, rows: Tensor) -> None:
        """Keep these rows, (M,) int64."""
        self.encoded = [each[rows] for each in self.encoded]
        self.target = self.target[rows]


class UncachedDecoder(nn.Module):
    """Offers what searches ask for by `encode` and `decode` of `net`, whose training needs them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.vocab_size: int = net.vocab_size  # type: ignore[assignment]

    @torch.no_grad()
    def begin(self, source: Tensor) -> Prefixes:
        """Encode the source."""
        return Prefixes([*self.net.encode(source)], source.new_empty(len(source), 0))  # type: ignore[operator]

    @torch.no_grad()
    def next_logits(self, tokens: Tensor, state: Prefixes) -> Tensor:
        """Run over all tokens so far, (N,) the new ones, and return the last logits."""
        state.target = torch.cat((state.target, tokens[:, None]), 1)
        logits: Tensor = self.net.decode(state.target, *state.encoded)[:, -1]  # type: ignore[operator]
        return logits
