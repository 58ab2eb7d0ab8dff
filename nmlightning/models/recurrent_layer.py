"""A layer of LSTM cells over a sentence, and the sentence backwards."""

import torch
from torch import Tensor, nn

Cell = tuple[Tensor, Tensor]  # h and c, (1, N, width) each


class RecurrentLayer(nn.Module):
    """norm(lstm(dropout(x))): (N, T, inputs) → (N, T, width), and h and c after the last token.

    Args:
        inputs: numbers in a vector that is read.
        width: units.
        dropout: share of the inputs that are set to zero in training.
        layer_norm: whether there is a norm.
    """

    def __init__(self, inputs: int, width: int, dropout: float, layer_norm: bool) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(inputs, width, batch_first=True)
        self.norm = nn.LayerNorm(width) if layer_norm else nn.Identity()

    def forward(self, x: Tensor, cell: Cell | None = None) -> tuple[Tensor, Cell]:
        y, after = self.lstm(self.dropout(x), cell)
        return self.norm(y), after


def reverse_sentences(x: Tensor, lengths: Tensor) -> Tensor:
    """Return (N, S, width) x with the first lengths[i] vectors of row i in reverse order.

    So what reads forwards reads the sentence backwards, and the padding, which stays, last.
    """
    places = torch.arange(x.shape[1], device=x.device)
    mirrored = lengths[:, None] - 1 - places
    order = torch.where(mirrored >= 0, mirrored, places)
    return x.gather(1, order[:, :, None].expand_as(x))
