"""What an LSTM with attention knows between two tokens that it writes."""

import torch
from torch import Tensor

from nmlightning.models.recurrent_layer import Cell


class LSTMState:
    """The encoded source, and the cells of the decoder; a row for each translation.

    Args:
        memory: the encoded source, (N, S, width).
        mask: (N, 1, S) bool, True where it may be read.
        cells: h and c of each layer of the decoder; None before the first token.
    """

    def __init__(self, memory: Tensor, mask: Tensor, cells: list[Cell | None]) -> None:
        self.memory = memory
        self.mask = mask
        self.cells = cells
        self._sentences = torch.arange(len(memory), device=memory.device)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, (M,) int64, in this order; any may be left out or repeated."""
        self.cells = [
            None if cell is None else (cell[0][:, rows], cell[1][:, rows]) for cell in self.cells
        ]
        sentences = self._sentences[rows]
        if not torch.equal(sentences, self._sentences):  # Else the source stays where it is.
            self._sentences = sentences
            self.memory = self.memory[rows]
            self.mask = self.mask[rows]
