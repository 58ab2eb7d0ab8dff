"""What our Transformer is measured against: torch's layers, and decoding without a cache."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmlightning.translation.tokenizer import PAD


class TorchTransformer(nn.Module):
    """The network of `nmlightning.models.Transformer`, written with `nn.Transformer…` layers.

    Dropout is where ours has it: torch's layers have two more in each, on the attention's weights
    and inside the feed-forward network, which are set to 0.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int = 512,
        hidden: int = 2048,
        heads: int = 8,
        layers: int = 6,
        dropout: float = 0.1,
        norm_first: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.dropout = nn.Dropout(dropout)
        sizes = (width, heads, hidden, dropout)
        last = nn.LayerNorm(width) if norm_first else None
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(*sizes, batch_first=True, norm_first=norm_first),
            layers,
            norm=last,
            enable_nested_tensor=False,
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(*sizes, batch_first=True, norm_first=norm_first),
            layers,
            norm=nn.LayerNorm(width) if norm_first else None,
        )
        for module in self.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
            elif isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
                module.dropout.p = 0.0

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """(N, S) and (N, T) tokens → (N, T, vocab_size) logits."""
        padding, length = source == PAD, target.shape[1]
        memory = self.encoder(self._enter(source), src_key_padding_mask=padding)
        future = torch.ones(length, length, dtype=torch.bool, device=target.device).triu(1)
        x = self.decoder(
            self._enter(target),
            memory,
            tgt_mask=future,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        return F.linear(x, self.embedding.weight)

    def _enter(self, tokens: Tensor) -> Tensor:
        length, width = tokens.shape[1], self.width
        waves = 10_000 ** (torch.arange(0, width, 2, device=tokens.device) / width)
        angles = torch.arange(length, device=tokens.device)[:, None] / waves
        positions = torch.empty(length, width, device=tokens.device)
        positions[:, 0::2], positions[:, 1::2] = angles.sin(), angles.cos()
        entered: Tensor = self.dropout(self.embedding(tokens) * width**0.5 + positions)
        return entered


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
