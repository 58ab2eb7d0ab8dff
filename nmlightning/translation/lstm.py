"""An LSTM encoder and decoder with attention, after GNMT (Wu et al. 2016, arXiv 1609.08144)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nmlightning.errors import check_flag, check_share, check_whole_number
from nmlightning.models.activation import reset_parts
from nmlightning.translation.embedding import Tied, TiedEmbedding
from nmlightning.translation.tokenizer import PAD

Cell = tuple[Tensor, Tensor]  # h and c, (1, N, width) each
Cells = list[Cell | None]


class RecurrentLayer(nn.Module):
    """norm(lstm(dropout(x))): (N, T, inputs) → (N, T, width), and h and c after the last token."""

    def __init__(self, inputs: int, width: int, dropout: float, layer_norm: bool) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(inputs, width, batch_first=True)
        self.norm = nn.LayerNorm(width) if layer_norm else nn.Identity()

    def forward(self, x: Tensor, cell: Cell | None = None) -> tuple[Tensor, Cell]:
        y, after = self.lstm(self.dropout(x), cell)
        return self.norm(y), after


def reverse_sentences(x: Tensor, lengths: Tensor) -> Tensor:
    """Return (N, S, width) x with the first lengths[i] of row i reversed; the padding stays."""
    places = torch.arange(x.shape[1], device=x.device)
    mirrored = lengths[:, None] - 1 - places
    order = torch.where(mirrored >= 0, mirrored, places)
    return x.gather(1, order[:, :, None].expand_as(x))


class LSTMState:
    """The encoded source, and the cells of the decoder; a row for each translation.

    `memory` (N, S, width) may be read where `mask` (N, 1, S) is True. `cells` are h and c of each
    layer of the decoder; None before the first token.
    """

    def __init__(self, memory: Tensor, mask: Tensor, cells: Cells) -> None:
        self.memory, self.mask, self.cells = memory, mask, cells
        self._sentences = torch.arange(len(memory), device=memory.device)

    def select(self, rows: Tensor) -> None:
        self.cells = [
            None if cell is None else (cell[0][:, rows], cell[1][:, rows]) for cell in self.cells
        ]
        sentences = self._sentences[rows]
        if not torch.equal(sentences, self._sentences):  # else nothing is copied
            self._sentences = sentences
            self.memory = self.memory[rows]
            self.mask = self.mask[rows]


FIRST_RESIDUAL = 2  # the third layer: GNMT's, section 3.1


class AttentionLSTM(nn.Module):
    """An LSTM encoder, attention, and an LSTM decoder.

    (N, S) source and (N, T) target tokens → (N, T, vocab_size) logits, those at t of the token that
    follows target[:, : t + 1]. Sentences are padded at their end with `PAD`, which no other
    position reads; a source has at least one other token.

    As in GNMT the first layer of the encoder reads in both directions, the others forwards, inputs
    are added to outputs from the third layer on, the decoder starts from zeros, and what attention
    reads is given to all its layers but the first. As in NVIDIA's GNMT v2
    (https://github.com/NVIDIA/DeepLearningExamples) the query is the first layer's output at the
    same token, not the one before, so that each layer runs over a sentence at once. The
    score is the general one of Luong et al. 2015 (arXiv 1508.04025), over √width:

        context_t = Σ_s softmax_s(h_sᵀ W q_t / √width) h_s

    Each layer is an `nn.LSTM`, whose matrices hold a row for each unit of each gate, and dropout is
    on the input of each. A layer norm stands on the output of each, where `swap_norms` finds it:
    inside the gates (Ba et al. 2016, arXiv 1607.06450) it would need a loop over the tokens in
    Python in place of one fused kernel.

    Args:
        vocab_size: number of tokens, with the special ones.
        width: units of a layer, and numbers in a vector.
        layers: layers of the encoder, and of the decoder; at least 2.
        dropout: share of numbers that are set to zero in training; at least 0 and less than 1.
        layer_norm: whether there is an `nn.LayerNorm` on the output of each layer.
        tied: "all": source, target and output are one matrix; "inputs": the output has its own;
            "output": the source has its own; "none": three matrices.

    Raises:
        InputError: for a setting out of its range.

    Examples:
        >>> import torch
        >>> net = AttentionLSTM(100, width=32)
        >>> net(torch.tensor([[7, 8, 2]]), torch.tensor([[1, 9, 9, 2]])).shape
        torch.Size([1, 4, 100])
    """

    def __init__(
        self,
        vocab_size: int,
        width: int = 512,
        layers: int = 2,
        dropout: float = 0.2,
        layer_norm: bool = False,
        tied: Tied = "all",
    ) -> None:
        super().__init__()
        check_whole_number("width", width)
        check_whole_number("layers", layers, least=2)
        check_share("dropout", dropout)
        check_flag("layer_norm", layer_norm)
        self.vocab_size = vocab_size
        self.words = TiedEmbedding(vocab_size, width, tied)
        settings = (width, dropout, layer_norm)
        self.forwards = RecurrentLayer(width, *settings)
        self.backwards = RecurrentLayer(width, *settings)
        widths = [2 * width] + [width] * (layers - 2)
        self.encoder = nn.ModuleList(RecurrentLayer(inputs, *settings) for inputs in widths)
        self.first_decoder = RecurrentLayer(width, *settings)
        self.query = nn.Linear(width, width, bias=False)
        widths = [2 * width] * (layers - 1)
        self.decoder = nn.ModuleList(RecurrentLayer(inputs, *settings) for inputs in widths)

    def reset_parameters(self) -> None:
        reset_parts(self)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.decode(target, *self.encode(source))

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Return the encoded source, (N, S, width), and where it may be read, (N, 1, S)."""
        is_word = source != PAD
        lengths = is_word.sum(1)
        x = self.words.embed_source(source)
        ahead, _ = self.forwards(x)
        back, _ = self.backwards(reverse_sentences(x, lengths))
        x = torch.cat((ahead, reverse_sentences(back, lengths)), 2)
        for number, layer in enumerate(self.encoder, 1):
            y, _ = layer(x)
            x = y + x if number >= FIRST_RESIDUAL else y
        return x, is_word[:, None]

    def decode(self, target: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Return the logits for (N, T) target tokens, given what `encode` returned."""
        logits, _ = self._write(target, memory, mask, [None] * (1 + len(self.decoder)))
        return logits

    @torch.no_grad()
    def begin(self, source: Tensor) -> LSTMState:
        """Encode (N, S) source tokens; no token of the target has been written."""
        memory, mask = self.encode(source)
        return LSTMState(memory, mask, [None] * (1 + len(self.decoder)))

    @torch.no_grad()
    def next_logits(self, tokens: Tensor, state: LSTMState) -> Tensor:
        """Write (N,) tokens, BOS first, into `state`; returns the next (N, vocab_size) logits."""
        logits, state.cells = self._write(tokens[:, None], state.memory, state.mask, state.cells)
        return logits[:, 0]

    def _write(
        self, target: Tensor, memory: Tensor, mask: Tensor, cells: Cells
    ) -> tuple[Tensor, Cells]:
        """Return the logits for (N, T) tokens that follow the cells, and the cells after them."""
        x, cell = self.first_decoder(self.words.embed_target(target), cells[0])
        # With a dimension of one head, which ONNX's exporter wants.
        query, read, seen = self.query(x)[:, None], memory[:, None], mask[:, None]
        context = F.scaled_dot_product_attention(query, read, read, attn_mask=seen)[:, 0]
        after: Cells = [cell]
        for number, layer in enumerate(self.decoder, 1):
            y, cell = layer(torch.cat((x, context), 2), cells[number])
            x = y + x if number >= FIRST_RESIDUAL else y
            after.append(cell)
        return self.words.logits(x), after
