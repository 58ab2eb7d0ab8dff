"""A sequence model of five or six tokens whose probabilities are drawn at random and known."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Prefixes:
    """The tokens written in each row, and its sentence."""

    sentences: list[int]
    written: list[tuple[int, ...]]

    def select(self, rows: Tensor) -> None:
        """Keep these rows."""
        self.sentences = [self.sentences[row] for row in rows.tolist()]
        self.written = [self.written[row] for row in rows.tolist()]


class WrittenOdds:
    """Logits that depend on the sentence's first token and on all that was written."""

    training = False

    def __init__(self, vocab_size: int = 6, sharpness: float = 1.0, seed: int = 0) -> None:
        self.vocab_size = vocab_size
        self.sharpness = sharpness
        self.seed = seed
        self.rows_asked: list[int] = []

    def logits(self, sentence: int, written: tuple[int, ...]) -> Tensor:
        """Return (vocab_size,) of what follows `written`, which begins with BOS."""
        seed = hash((self.seed, sentence, *written)) % 2**31
        generator = torch.Generator().manual_seed(seed)
        return self.sharpness * torch.randn(self.vocab_size, generator=generator)

    def begin(self, source: Tensor) -> Prefixes:
        """Nothing has been written."""
        return Prefixes(source[:, 0].tolist(), [()] * len(source))

    def next_logits(self, tokens: Tensor, state: Prefixes) -> Tensor:
        """Write them."""
        self.rows_asked.append(len(tokens))
        pairs = zip(state.written, tokens.tolist(), strict=True)
        state.written = [(*written, token) for written, token in pairs]
        both = zip(state.sentences, state.written, strict=True)
        return torch.stack([self.logits(*each) for each in both])
