"""The Transformer of Vaswani et al. (2017), https://arxiv.org/abs/1706.03762."""

import functools

import torch
from torch import Tensor, nn

from nmlightning.errors import InputError, check_choice, check_flag, check_share, check_whole_number
from nmlightning.models.branch_scale import scale_down
from nmlightning.models.positions import sinusoids
from nmlightning.models.reset import reset_parts
from nmlightning.models.tied_words import Tied, TiedWords
from nmlightning.models.transformer_layers import (
    NORMS,
    DecoderLayer,
    EncoderLayer,
    LayerSizes,
    Norm,
    make_norm,
)
from nmlightning.models.transformer_state import TransformerState
from nmlightning.text.special_tokens import PAD


class Transformer(nn.Module):
    """Encoder and decoder with attention; the base model of the paper unless told otherwise.

    (N, S) source and (N, T) target tokens → (N, T, vocab_size) logits, those at t of the token that
    follows target[:, : t + 1]. Sentences are padded at their end with `PAD`, which no other
    position reads; a source has at least one other token. Dropout is where the paper has it: on the
    sum of vectors and positions, and on what a branch returns before it is added.

    Args:
        vocab_size: number of tokens, with the special ones.
        width: numbers in a vector; even, and a multiple of `heads`.
        hidden: width of the feed-forward networks between their two matrices.
        heads: heads of an attention.
        encoder_layers: layers that read the source.
        decoder_layers: layers that write the target.
        dropout: share of numbers that are set to zero in training; at least 0 and less than 1.
        norm: "layer" (`nn.LayerNorm`), "rms" (`nn.RMSNorm`), or "none", for normalised weights in
            its place.
        norm_first: put the norm before the branch (Xiong et al. 2020, arXiv 2002.04745) and another
            at the end of encoder and decoder, in place of after the sum.
        tied: "all": source, target and output are one matrix, as in the paper; "inputs": the output
            has its own; "output": the source has its own; "none": three matrices. Without norms an
            output tied to the target's vectors finds each token itself in what enters: it starts at
            a loss of about √width, an output of its own at ln(vocab_size) + 1.
        scale_branches: draw the last matrix of each of the n branches of the encoder 1/√n times as
            large, and likewise in the decoder, so that the sum of all has the variance of one. A
            network without norms needs it to start; see `CifarResNet`.

    Raises:
        InputError: for a setting out of its range; `width` that is odd or no multiple of `heads`.

    Example:
        >>> import torch
        >>> net = Transformer(100, width=32, hidden=64, heads=2, encoder_layers=1, decoder_layers=1)
        >>> net(torch.tensor([[7, 8, 2]]), torch.tensor([[1, 9, 9, 2]])).shape
        torch.Size([1, 4, 100])
    """

    def __init__(
        self,
        vocab_size: int,
        width: int = 512,
        hidden: int = 2048,
        heads: int = 8,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        dropout: float = 0.1,
        norm: Norm = "layer",
        norm_first: bool = False,
        tied: Tied = "all",
        scale_branches: bool = False,
    ) -> None:
        super().__init__()
        sizes = _check_sizes(width, hidden, heads, dropout, norm, norm_first)
        check_whole_number("encoder_layers", encoder_layers)
        check_whole_number("decoder_layers", decoder_layers)
        self.vocab_size = vocab_size
        self.width = width
        self.scale_branches = check_flag("scale_branches", scale_branches)
        self.words = TiedWords(vocab_size, width, tied)
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(EncoderLayer(sizes) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(sizes) for _ in range(decoder_layers))
        last = norm if norm_first else "none"
        self.encoder_norm = make_norm(last, width)
        self.decoder_norm = make_norm(last, width)
        if scale_branches:
            self._scale_branches()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        reset_parts(self)
        if self.scale_branches:
            self._scale_branches()

    def _scale_branches(self) -> None:
        for layers in (self.encoder, self.decoder):
            scale_down([linear for layer in layers for linear in layer.last_linears])  # type: ignore[union-attr]

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.decode(target, *self.encode(source))

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Return the encoded source, (N, S, width), and where it may be read, (N, 1, 1, S)."""
        mask = (source != PAD)[:, None, None, :]
        x = self._enter(self.words.embed_source(source))
        for layer in self.encoder:
            x = layer(x, mask)
        return self.encoder_norm(x), mask

    def decode(self, target: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Return the logits for (N, T) target tokens, given what `encode` returned."""
        x = self._enter(self.words.embed_target(target))
        for layer in self.decoder:
            x = layer(x, memory, mask)
        return self.words.logits(self.decoder_norm(x))

    @torch.no_grad()
    def begin(self, source: Tensor) -> TransformerState:
        """Encode (N, S) source tokens; no token of the target has been written."""
        memory, mask = self.encode(source)
        remembered = [layer.source_attention.remember(memory) for layer in self.decoder]  # type: ignore[operator, union-attr]
        return TransformerState(remembered, None if bool(mask.all()) else mask)

    @torch.no_grad()
    def next_logits(self, tokens: Tensor, state: TransformerState) -> Tensor:
        """Write (N,) tokens, BOS at first, and return (N, vocab_size) logits of those to follow.

        `state` is advanced in place.
        """
        x = self._enter(self.words.embed_target(tokens[:, None]), state.length)
        for i, layer in enumerate(self.decoder):
            append = functools.partial(state.append, i)
            x = layer.step(x, append, state.source[i], state.mask)  # type: ignore[operator]
        state.length += 1
        return self.words.logits(self.decoder_norm(x[:, 0]))

    def _enter(self, vectors: Tensor, first: int = 0) -> Tensor:
        """Return what enters the layers; the first of (N, T, width) vectors is at `first`."""
        last = first + vectors.shape[1]
        positions = sinusoids(first, last, self.width, vectors.device)
        x: Tensor = self.dropout(vectors + positions.to(vectors.dtype))
        return x


def _check_sizes(
    width: int, hidden: int, heads: int, dropout: float, norm: Norm, norm_first: bool
) -> LayerSizes:
    check_whole_number("hidden", hidden)
    check_whole_number("heads", heads)
    check_whole_number("width", width)
    if width % heads or width % 2:
        raise InputError(
            f"width must be even and a multiple of heads, got {width} with {heads} heads."
        )
    check_share("dropout", dropout)
    check_choice("norm", norm, NORMS)
    return LayerSizes(width, hidden, heads, dropout, norm, check_flag("norm_first", norm_first))
