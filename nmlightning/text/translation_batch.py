"""What a translation model is trained and measured on."""

from typing import NamedTuple

from torch import Tensor


class TranslationBatch(NamedTuple):
    """Sentence pairs as tokens, padded at the end with `PAD`.

    Attributes:
        source: (N, S) int64: the tokens of each sentence and EOS.
        target: (N, T) int64: BOS, the tokens of each translation, and EOS.
        words: (N,) int64: the words of each translation, split at white space, and one for its end.
        references: the translations as they were written; empty in training.
    """

    source: Tensor
    target: Tensor
    words: Tensor
    references: tuple[str, ...] = ()
