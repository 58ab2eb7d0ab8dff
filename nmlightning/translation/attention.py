"""Multi-head attention (Vaswani et al. 2017, section 3.2), and its cached keys and values."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Each position reads from a memory what it asks for, in several heads side by side.

        out(concat_h(softmax(q_h k_hᵀ / √d) v_h)),  q = query(x), k = key(memory), v = value(memory)

    with d = width / heads. https://arxiv.org/abs/1706.03762. Four linear layers, so that each
    matrix has a name and, under weight norm, a bound of its own.

    Args:
        width: numbers in a vector; a multiple of `heads`.
        heads: number of heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw as `nn.Transformer` does: after Glorot, query, key and value as one matrix."""
        for layer in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(layer.weight, gain=1 / math.sqrt(2))
        nn.init.xavier_uniform_(self.out.weight)
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.zeros_(layer.bias)

    def forward(
        self, x: Tensor, memory: Tensor, mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Return what (N, T, width) `x` reads from (N, S, width) `memory`, (N, T, width).

        `mask` is bool, broadcast to (N, heads, T, S), True where a position may be read;
        `is_causal` lets position t read the positions 0 … t.
        """
        return self.read(x, *self.remember(memory), mask, is_causal)

    def remember(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of (N, S, width) `memory`, each (N, heads, S, d)."""
        return self._split(self.key(memory)), self._split(self.value(memory))

    def read(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Return the same as `forward`, with what `remember` has returned for the memory."""
        queries = self._split(self.query(x))
        heads = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=is_causal
        )
        read: Tensor = self.out(heads.transpose(1, 2).flatten(2))
        return read

    def _split(self, x: Tensor) -> Tensor:
        """(N, T, width) → (N, heads, T, d)."""
        return x.view(*x.shape[:2], self.heads, x.shape[2] // self.heads).transpose(1, 2)


FIRST_ROOM = 16


class TransformerState:
    """Keys and values of the source, and of what was written so far; a row for each translation.

    Those of the source are computed once. Those of the target have room for more tokens than there
    are, twice as much whenever it is full, so that those of a new token are written in place. Rows
    move between two such places, since fresh memory costs several times as much as the copying.

    Args:
        source: keys and values of the source in each layer, (N, heads, S, d) each.
        mask: (N, 1, 1, S) bool, True where the source may be read; None if all of it may.

    Attributes:
        length: how many tokens were written.
    """

    def __init__(self, source: list[tuple[Tensor, Tensor]], mask: Tensor | None) -> None:
        self.source = source
        self.mask = mask
        self.length = 0
        keys = source[0][0]
        rows, heads, _, d = keys.shape
        self._own = keys.new_empty(len(source), 2, rows, heads, FIRST_ROOM, d)
        self._spare = self._own[:, :, :0]
        self._sentences = torch.arange(rows, device=keys.device)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of one more token, (N, heads, 1, d) each, and return all of the layer.

        The token counts for all layers once `length` has grown.
        """
        end = self.length + 1
        if end > self._own.shape[4]:
            self._own = torch.cat((self._own, torch.empty_like(self._own)), 4)
        own = self._own[layer, :, :, :, :end]
        own[0, :, :, -1:] = keys
        own[1, :, :, -1:] = values
        return own[0], own[1]

    def select(self, rows: Tensor) -> None:
        """Keep these rows, (M,) int64, in this order; any may be left out or repeated."""
        layers, kinds, _, *rest = self._own.shape
        if self._spare.shape[2] < len(rows) or self._spare.shape[4] < self._own.shape[4]:
            self._spare = self._own.new_empty(layers, kinds, len(rows), *rest)
        written, place = (x[:, :, :, :, : self.length] for x in (self._own, self._spare))
        torch.index_select(written, 2, rows, out=place[:, :, : len(rows)])
        self._own, self._spare = self._spare[:, :, : len(rows)], self._own
        sentences = self._sentences[rows]
        if not torch.equal(sentences, self._sentences):  # Else the source stays where it is.
            self._sentences = sentences
            self.source = [(keys[rows], values[rows]) for keys, values in self.source]
            self.mask = None if self.mask is None else self.mask[rows]
