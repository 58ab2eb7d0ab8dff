"""What a Transformer knows between two tokens that it writes: keys and values."""

import torch
from torch import Tensor

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
