"""Multi-head attention (Vaswani et al. 2017, section 3.2)."""

import math

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
