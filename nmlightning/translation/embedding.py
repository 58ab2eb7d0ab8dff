"""Embeddings of source and target and the output layer, which may share one matrix."""

import math
from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from nmlightning.errors import check_choice, check_whole_number
from nmlightning.translation.tokenizer import SPECIAL_TOKENS

Tied = Literal["all", "inputs", "output", "none"]


class TiedEmbedding(nn.Module):
    """Embeds the tokens of source and target, and returns the logits of the tokens to come.

        vector = √width · E[token],    logits = W x,    E and W of N(0, 1/width) at first

    Vectors have the variance 1, and so have the logits of an x that has it (Vaswani et al. 2017,
    section 3.4, https://arxiv.org/abs/1706.03762).

    An output layer that is tied to an embedding (Press & Wolf 2017, arXiv 1608.05859; see `tied` of
    `Transformer`) is no module but reads the embedding's weight, so that a weight norm of it counts
    for both. PAD has a vector like the others: its value never counts, and a row of zeros could not
    be normalised.
    """

    def __init__(self, vocab_size: int, width: int, tied: Tied) -> None:
        super().__init__()
        check_choice("tied", tied, get_args(Tied))
        check_whole_number("vocab_size", vocab_size, least=len(SPECIAL_TOKENS) + 1)
        self.scale = math.sqrt(width)
        self.target = nn.Embedding(vocab_size, width)
        has_own_source, has_own_output = tied in ("output", "none"), tied in ("inputs", "none")
        self.own_source = nn.Embedding(vocab_size, width) if has_own_source else None
        self.own_output = nn.Linear(width, vocab_size, bias=False) if has_own_output else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the entries from N(0, 1/width)."""
        for weight in self.parameters():
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def embed_source(self, tokens: Tensor) -> Tensor:
        """Return the vectors of (N, S) tokens, (N, S, width)."""
        embedding = self.target if self.own_source is None else self.own_source
        vectors: Tensor = embedding(tokens) * self.scale
        return vectors

    def embed_target(self, tokens: Tensor) -> Tensor:
        """Return the vectors of (N, T) tokens, (N, T, width)."""
        vectors: Tensor = self.target(tokens) * self.scale
        return vectors

    def get_output_embeddings(self) -> nn.Module:
        """Return the layer whose weight gives the logits, by the name that Hugging Face has."""
        return self.target if self.own_output is None else self.own_output

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of all tokens, (…, width) → (…, vocab_size)."""
        return F.linear(x, self.get_output_embeddings().weight)  # type: ignore[arg-type]


TiedWords = TiedEmbedding  # its former name, in pickled networks
