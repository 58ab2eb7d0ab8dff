"""Greedy search against its definition on known probabilities."""

from typing import Any

import pytest
import torch

from nmlightning.errors import InputError
from nmlightning.models import greedy_search
from nmlightning.translation.tokenizer import BOS, EOS, PAD
from written_odds import WrittenOdds

SOURCE = torch.tensor([[5, 4, 2, 0, 0], [4, 2, 0, 0, 0], [3, 4, 4, 5, 2]])


def follow(net: WrittenOdds, sentence: int, limit: int) -> list[int]:
    """Return the translation by the definition."""
    written = [BOS]
    while len(written) <= limit:
        logits = net.logits(sentence, tuple(written)).tolist()
        allowed = [token for token in range(net.vocab_size) if token not in (PAD, BOS)]
        best = max(allowed, key=logits.__getitem__)
        if best == EOS:
            break
        written.append(best)
    return written[1:]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("extra_length", [0, 4, 50])
def test_it_is_the_definition(seed: int, extra_length: int) -> None:
    net = WrittenOdds(seed=seed)
    lengths = [3, 2, 5]
    expected = [
        follow(net, int(row[0]), length + extra_length)
        for row, length in zip(SOURCE, lengths, strict=True)
    ]
    assert greedy_search(net, SOURCE, extra_length=extra_length) == expected


def test_finished_sentences_leave_the_batch() -> None:
    net = WrittenOdds(vocab_size=9)
    source = torch.arange(3, 23)[:, None]
    found = greedy_search(net, source, extra_length=5)
    steps = [min(len(translation) + 1, 6) for translation in found]
    assert net.rows_asked == [sum(s > t for s in steps) for t in range(max(steps))]
    assert len(set(net.rows_asked)) > 3


def test_no_sentence() -> None:
    assert greedy_search(WrittenOdds(), SOURCE[:0]) == []


@pytest.mark.parametrize(
    ("source", "extra_length", "message"),
    [
        (SOURCE, -1, r"extra_length must be a whole number of at least 0, got -1"),
        (SOURCE[0], 50, r"source is \(N, S\) tokens of int64, got \(5,\) of torch\.int64"),
        (SOURCE.float(), 50, r"got \(3, 5\) of torch\.float32"),
        (SOURCE * torch.tensor([[1], [0], [1]]), 50, r"no token but padding in row 1: end it"),
    ],
)
def test_what_cannot_be_is_refused(source: Any, extra_length: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        greedy_search(WrittenOdds(), source, extra_length=extra_length)
