"""Translates lines of text: sorted by length, in batches, and back in their order."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nmlightning.errors import InputError, check_whole_number
from nmlightning.translation.decoding import check_length_penalty
from nmlightning.translation.task import Translator
from nmlightning.translation.tokenizer import EOS, PAD


@dataclass(frozen=True)
class LineOptions:
    """How lines are translated.

    Attributes:
        tokens_a_batch: padded tokens of the source sentences of a batch, at most; a longer sentence
            is a batch of its own.
        max_length: tokens of a sentence, at most; the rest is not translated.
        beam_size: hypotheses a sentence; None means the task's, 1 is greedy.
        length_penalty: of the beam search; None means the task's.
    """

    tokens_a_batch: int = 2000
    max_length: int = 256
    beam_size: int | None = None
    length_penalty: float | None = None

    def __post_init__(self) -> None:
        for name in ("tokens_a_batch", "max_length"):
            check_whole_number(name, getattr(self, name))
        if self.beam_size is not None:
            check_whole_number("beam_size", self.beam_size)
        if self.length_penalty is not None:
            check_length_penalty(self.length_penalty)


def translate_lines(
    task: Translator,
    lines: Sequence[str],
    options: LineOptions | None = None,
    on_translated: Callable[[int], object] | None = None,
) -> tuple[list[str], list[int]]:
    """Return the translation of each line, in order, and the positions of those that were cut.

    A line of white space alone stays an empty line.

    Args:
        task: on the device that translates, in evaluation mode.
        lines: a sentence each.
        options: how; None means the defaults.
        on_translated: called with the number of lines that are done, after each batch, or None.

    Raises:
        InputError: the task has no tokenizer.
    """
    options = options or LineOptions()
    if task.tokenizer is None:
        raise InputError("the model has no tokenizer: it was not trained as a Translator is.")
    whole = task.tokenizer.encode(lines)
    tokens = [sentence[: options.max_length] for sentence in whole]
    cut = [row for row, sentence in enumerate(whole) if len(sentence) > options.max_length]
    found = [""] * len(lines)
    rows = [row for row, line in enumerate(lines) if line.strip()]
    rows.sort(key=lambda row: len(tokens[row]), reverse=True)
    if on_translated:
        on_translated(len(lines) - len(rows))
    with torch.inference_mode():
        for batch in _batches(rows, tokens, options.tokens_a_batch):
            source = _pad([tokens[row] for row in batch]).to(task.device)
            translations = task.translate(
                source, beam_size=options.beam_size, length_penalty=options.length_penalty
            )
            for row, translation in zip(batch, translations, strict=True):
                found[row] = translation
            if on_translated:
                on_translated(len(batch))
    return found, cut


def _batches(
    rows: Sequence[int], tokens: Sequence[Sequence[int]], tokens_a_batch: int
) -> Iterator[Sequence[int]]:
    """Yield the rows in batches, whose first is the longest."""
    start = 0
    while start < len(rows):
        width = len(tokens[rows[start]]) + 1
        count = max(1, tokens_a_batch // width)
        yield rows[start : start + count]
        start += count


def _pad(sentences: Sequence[Sequence[int]]) -> Tensor:
    ended = [torch.tensor([*sentence, EOS]) for sentence in sentences]
    return pad_sequence(ended, batch_first=True, padding_value=PAD)
