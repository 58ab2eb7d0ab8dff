"""The Transformer of Vaswani et al. (2017), https://arxiv.org/abs/1706.03762."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nmlightning.errors import InputError, check_choice, check_flag, check_share, check_whole_number
from nmlightning.models.activation import reset_parts, scale_down
from nmlightning.translation.embedding import Tied, TiedEmbedding
from nmlightning.translation.tokenizer import PAD

Norm = Literal["layer", "rms", "none"]
EPS = 1e-5  # nn.LayerNorm's; nn.RMSNorm's own depends on the dtype


@dataclass(frozen=True)
class LayerSizes:
    """The settings that all layers of a Transformer share; see `Transformer`."""

    width: int
    hidden: int
    heads: int
    dropout: float
    norm: Norm
    norm_first: bool

    def __post_init__(self) -> None:
        for name in ("hidden", "heads", "width"):
            check_whole_number(name, getattr(self, name))
        if self.width % self.heads or self.width % 2:
            raise InputError(
                f"width must be even and a multiple of heads, got {self.width} with {self.heads} "
                "heads."
            )
        check_share("dropout", self.dropout)
        check_choice("norm", self.norm, get_args(Norm))
        check_flag("norm_first", self.norm_first)


def make_norm(norm: Norm, width: int) -> nn.Module:
    """Return a new norm over the last dimension; for "none" it does nothing."""
    if norm == "none":
        return nn.Identity()
    return nn.LayerNorm(width, EPS) if norm == "layer" else nn.RMSNorm(width, EPS)


class Residual(nn.Module):
    """Adds a branch to its input, with dropout and a norm.

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


class Attention(nn.Module):
    """Multi-head attention of each position to a memory (section 3.2 of the paper).

        out(concat_h(softmax(q_h k_hᵀ / √d) v_h)),  q = query(x), k = key(memory), v = value(memory)

    with d = width / heads, which is whole. Four linear layers, so that each matrix has a name and,
    under weight norm, a bound of its own.
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
        """Draw as `nn.Transformer` does: by Glorot, query, key and value as one matrix."""
        for layer in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(layer.weight, gain=1 / math.sqrt(2))
        nn.init.xavier_uniform_(self.out.weight)
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.zeros_(layer.bias)

    def forward(
        self, x: Tensor, memory: Tensor, mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend from (N, T, width) `x` to (N, S, width) `memory`; returns (N, T, width).

        `mask` is bool, broadcast to (N, heads, T, S), True where a position may be read;
        `is_causal` lets position t read the positions 0 … t.
        """
        return self.attend(x, *self.keys_and_values(memory), mask, is_causal)

    def keys_and_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of (N, S, width) `memory`, each (N, heads, S, d)."""
        return self._split(self.key(memory)), self._split(self.value(memory))

    def attend(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Return the same as `forward`, from the keys and values of the memory."""
        heads = F.scaled_dot_product_attention(
            self._split(self.query(x)), keys, values, attn_mask=mask, is_causal=is_causal
        )
        y: Tensor = self.out(heads.transpose(1, 2).flatten(2))
        return y

    def _split(self, x: Tensor) -> Tensor:
        """(N, T, width) → (N, heads, T, d)."""
        return x.view(*x.shape[:2], self.heads, x.shape[2] // self.heads).transpose(1, 2)


class FeedForward(nn.Module):
    """outer(max(0, inner(x))), for each position on its own."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, width)
        self.relu = nn.ReLU(inplace=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
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

        `append` returns keys and values of all positions, given this one's; `source` has the
        source's.
        """
        own = self.attention
        x = self.attention_sum(x, lambda y: own.attend(y, *append(*own.keys_and_values(y))))
        x = self.source_attention_sum(x, lambda y: self.source_attention.attend(y, *source, mask))
        y: Tensor = self.feed_forward_sum(x, self.feed_forward)
        return y


FIRST_CAPACITY = 16  # tokens


class TransformerState:
    """A cache of keys and values of the source and of the tokens so far; a row a translation.

    Those of the source are computed once, (N, heads, S, d) each, in each layer, and may be read
    where the mask (N, 1, 1, S) is True, or everywhere. The buffer for the target's doubles whenever
    it is full, so that those of a new token are written in place. Rows move between two buffers,
    since fresh memory costs several times as much as the copying.
    """

    def __init__(self, source: list[tuple[Tensor, Tensor]], mask: Tensor | None) -> None:
        self.source = source
        self.mask = mask
        self.length = 0  # tokens so far
        keys = source[0][0]
        rows, heads, _, d = keys.shape
        self._own = keys.new_empty(len(source), 2, rows, heads, FIRST_CAPACITY, d)
        self._spare = self._own[:, :, :0]
        self._sentences = torch.arange(rows, device=keys.device)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of one more token, (N, heads, 1, d) each, and return all of the layer."""
        end = self.length + 1
        if end > self._own.shape[4]:
            self._own = torch.cat((self._own, torch.empty_like(self._own)), 4)
        own = self._own[layer, :, :, :, :end]
        own[0, :, :, -1:] = keys
        own[1, :, :, -1:] = values
        return own[0], own[1]

    def select(self, rows: Tensor) -> None:
        layers, kinds, _, *rest = self._own.shape
        if self._spare.shape[2] < len(rows) or self._spare.shape[4] < self._own.shape[4]:
            self._spare = self._own.new_empty(layers, kinds, len(rows), *rest)
        written, place = (x[:, :, :, :, : self.length] for x in (self._own, self._spare))
        torch.index_select(written, 2, rows, out=place[:, :, : len(rows)])
        self._own, self._spare = self._spare[:, :, : len(rows)], self._own
        sentences = self._sentences[rows]
        if not torch.equal(sentences, self._sentences):  # else nothing is copied
            self._sentences = sentences
            self.source = [(keys[rows], values[rows]) for keys, values in self.source]
            self.mask = None if self.mask is None else self.mask[rows]


LONGEST_WAVE = 10_000  # in units of 2π positions


def sinusoids(first: int, last: int, width: int, device: torch.device) -> Tensor:
    """Return the vectors of the positions `first` … `last` − 1, (last − first, width) float32.

        p[t, 2i] = sin(t · 10000^(−2i / width)),    p[t, 2i + 1] = cos(t · 10000^(−2i / width))

    Computed for each call: there is no longest sentence, and no half precision before the sine.
    """
    positions = torch.arange(first, last, device=device, dtype=torch.float32)
    even = torch.arange(0, width, 2, device=device, dtype=torch.float32)
    angles = positions[:, None] * torch.exp(even * (-math.log(LONGEST_WAVE) / width))
    return torch.stack((angles.sin(), angles.cos()), 2).flatten(1)


class Transformer(nn.Module):
    """Encoder and decoder with attention; by default the base model of the paper.

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

    Examples:
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
        sizes = LayerSizes(width, hidden, heads, dropout, norm, norm_first)
        check_whole_number("encoder_layers", encoder_layers)
        check_whole_number("decoder_layers", decoder_layers)
        self.vocab_size = vocab_size
        self.width = width
        self.scale_branches = check_flag("scale_branches", scale_branches)
        self.words = TiedEmbedding(vocab_size, width, tied)
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(EncoderLayer(sizes) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(sizes) for _ in range(decoder_layers))
        last = norm if norm_first else "none"
        self.encoder_norm = make_norm(last, width)
        self.decoder_norm = make_norm(last, width)
        self._scale_branches()

    def reset_parameters(self) -> None:
        reset_parts(self)
        self._scale_branches()

    def _scale_branches(self) -> None:
        if not self.scale_branches:
            return
        for layers in (self.encoder, self.decoder):
            attentions = [part.out for part in layers.modules() if isinstance(part, Attention)]
            others = [part.outer for part in layers.modules() if isinstance(part, FeedForward)]
            scale_down([*attentions, *others])

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
        pairs = [layer.source_attention.keys_and_values(memory) for layer in self.decoder]  # type: ignore[operator, union-attr]
        return TransformerState(pairs, None if bool(mask.all()) else mask)

    @torch.no_grad()
    def next_logits(self, tokens: Tensor, state: TransformerState) -> Tensor:
        """Write (N,) tokens, BOS first, into `state`; returns the next (N, vocab_size) logits."""
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
