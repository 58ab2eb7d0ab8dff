"""The layers of a Transformer, out of attention, feed-forward networks, norms and dropout."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from nmlightning.models.attention import Attention

Norm = Literal["layer", "rms", "none"]
NORMS: tuple[Norm, ...] = ("layer", "rms", "none")
EPS = 1e-5  # nn.LayerNorm's; nn.RMSNorm's own depends on the dtype


@dataclass(frozen=True)
class LayerSizes:
    """What the layers of a Transformer have in common; see `Transformer`."""

    width: int
    hidden: int
    heads: int
    dropout: float
    norm: Norm
    norm_first: bool


def make_norm(norm: Norm, width: int) -> nn.Module:
    """Return a new norm over the last dimension; for "none" it does nothing."""
    if norm == "none":
        return nn.Identity()
    return nn.LayerNorm(width, EPS) if norm == "layer" else nn.RMSNorm(width, EPS)


class Residual(nn.Module):
    """What a branch adds to its input, and the norm that stands there.

    norm(x + dropout(branch(x))), or x + dropout(branch(norm(x))) with the norm first.
    """

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.norm_first = sizes.norm_first
        self.norm = make_norm(sizes.norm, sizes.width)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        if self.norm_first:
            y: Tensor = x + self.dropout(branch(self.norm(x)))
        else:
            y = self.norm(x + self.dropout(branch(x)))
        return y


class FeedForward(nn.Module):
    """outer(max(0, inner(x))), for each position on its own."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, width)
        self.relu = nn.ReLU(inplace=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the matrices after Glorot."""
        for layer in (self.inner, self.outer):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.outer(self.relu(self.inner(x)))
        return y


class EncoderLayer(nn.Module):
    """Self-attention, then a feed-forward network."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.attention = Attention(sizes.width, sizes.heads)
        self.attention_sum = Residual(sizes)
        self.feed_forward = FeedForward(sizes.width, sizes.hidden)
        self.feed_forward_sum = Residual(sizes)

    @property
    def last_linears(self) -> list[nn.Linear]:
        """The layer that each branch ends with."""
        return [self.attention.out, self.feed_forward.outer]

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(N, S, width) → (N, S, width); `mask` is broadcast to (N, heads, S, S)."""
        x = self.attention_sum(x, lambda y: self.attention(y, y, mask))
        y: Tensor = self.feed_forward_sum(x, self.feed_forward)
        return y


class DecoderLayer(nn.Module):
    """Self-attention to what came before, attention to the source, a feed-forward network."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.attention = Attention(sizes.width, sizes.heads)
        self.attention_sum = Residual(sizes)
        self.source_attention = Attention(sizes.width, sizes.heads)
        self.source_attention_sum = Residual(sizes)
        self.feed_forward = FeedForward(sizes.width, sizes.hidden)
        self.feed_forward_sum = Residual(sizes)

    @property
    def last_linears(self) -> list[nn.Linear]:
        """The layer that each branch ends with."""
        return [self.attention.out, self.source_attention.out, self.feed_forward.outer]

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """(N, T, width) → (N, T, width); `memory` (N, S, width) is the encoded source."""
        x = self.attention_sum(x, lambda y: self.attention(y, y, is_causal=True))
        x = self.source_attention_sum(x, lambda y: self.source_attention(y, memory, mask))
        y: Tensor = self.feed_forward_sum(x, self.feed_forward)
        return y

    def step(
        self,
        x: Tensor,
        append: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        source: tuple[Tensor, Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        """Return the same for one more position, (N, 1, width) → (N, 1, width).

        `append` takes the keys and values of this position and returns those of all so far;
        `source` is what `source_attention.remember` has returned for the encoded source.
        """
        own = self.attention
        x = self.attention_sum(x, lambda y: own.read(y, *append(*own.remember(y))))
        x = self.source_attention_sum(x, lambda y: self.source_attention.read(y, *source, mask))
        y: Tensor = self.feed_forward_sum(x, self.feed_forward)
        return y
