"""Beam search against all translations and a plain beam, and greedy search as a beam of one."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from nmlightning.errors import InputError
from nmlightning.models import beam_search, greedy_search
from nmlightning.translation.tokenizer import BOS, EOS, PAD


@dataclass
class Prefixes:
    """The tokens written in each row, and its sentence."""

    sentences: list[int]
    written: list[tuple[int, ...]]

    def select(self, rows: Tensor) -> None:
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
        return Prefixes(source[:, 0].tolist(), [()] * len(source))

    def next_logits(self, tokens: Tensor, state: Prefixes) -> Tensor:
        self.rows_asked.append(len(tokens))
        pairs = zip(state.written, tokens.tolist(), strict=True)
        state.written = [(*written, token) for written, token in pairs]
        both = zip(state.sentences, state.written, strict=True)
        return torch.stack([self.logits(*each) for each in both])


SENTENCES = torch.tensor([[5, 4, 2, 0, 0], [4, 2, 0, 0, 0], [3, 4, 4, 5, 2]])


def test_greedy_search_drops_finished_sentences() -> None:
    net = WrittenOdds(vocab_size=9)
    source = torch.arange(3, 23)[:, None]
    found = greedy_search(net, source, extra_length=5)
    steps = [min(len(translation) + 1, 6) for translation in found]
    assert net.rows_asked == [sum(s > t for s in steps) for t in range(max(steps))]
    assert len(set(net.rows_asked)) > 3


@pytest.mark.parametrize("search", [greedy_search, beam_search])
def test_search_of_no_sentence_finds_none(search: Any) -> None:
    assert search(WrittenOdds(), SENTENCES[:0]) == []


SOURCE = torch.tensor([[5, 4, 2], [4, 2, 0], [3, 2, 0]])

LIMITS = [4, 3, 3]  # with one token more


def chances(net: WrittenOdds, sentence: int, written: tuple[int, ...]) -> list[float]:
    """Return the log-probabilities of what follows, PAD and BOS ruled out."""
    chances = net.logits(sentence, (BOS, *written)).log_softmax(0)
    chances[[PAD, BOS]] = -math.inf
    return chances.tolist()


def score(net: WrittenOdds, sentence: int, tokens: tuple[int, ...], alpha: float) -> float:
    """Return log P / ((5 + |Y|) / 6)^α."""
    total = sum(chances(net, sentence, tokens[:t])[token] for t, token in enumerate(tokens))
    return total / ((5 + len(tokens)) / 6) ** alpha


def search_all(net: WrittenOdds, sentence: int, limit: int, alpha: float) -> list[int]:
    """Return the best of all translations that end within the limit."""
    words = [token for token in range(net.vocab_size) if token not in (PAD, BOS, EOS)]
    every = ((*tokens, EOS) for n in range(limit) for tokens in itertools.product(words, repeat=n))
    return list(max(every, key=lambda tokens: score(net, sentence, tokens, alpha)))[:-1]


def search_by_hand(
    net: WrittenOdds, sentence: int, limit: int, alpha: float, beam_size: int
) -> list[int]:
    beam: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    kept: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, limit + 1):
        grown = sorted(
            (
                (total + chance, (*tokens, token))
                for total, tokens in beam
                for token, chance in enumerate(chances(net, sentence, tokens))
            ),
            reverse=True,
        )
        ended = [each for each in grown[:beam_size] if each[1][-1] == EOS]
        kept += [(total / ((5 + length) / 6) ** alpha, tokens[:-1]) for total, tokens in ended]
        beam = [each for each in grown if each[1][-1] != EOS][:beam_size]
        hope = beam[0][0] / ((5 + limit) / 6) ** alpha
        if len(kept) >= beam_size or (kept and max(kept)[0] >= hope):
            break
    return list(max(kept)[1] if kept else beam[0][1])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_beam_search_with_a_wide_beam_finds_the_best_of_all(seed: int, alpha: float) -> None:
    net = WrittenOdds(seed=seed)
    found = beam_search(net, SOURCE, beam_size=200, length_penalty=alpha, extra_length=1)
    sentences = zip(SOURCE[:, 0].tolist(), LIMITS, strict=True)
    assert found == [search_all(net, *each, alpha) for each in sentences]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("beam_size", [1, 2, 4, 7])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("vocab_size", [5, 8])
def test_beam_search_by_hand(seed: int, beam_size: int, alpha: float, vocab_size: int) -> None:
    net = WrittenOdds(vocab_size, seed=seed)
    found = beam_search(net, SOURCE, beam_size=beam_size, length_penalty=alpha, extra_length=6)
    sentences = zip(SOURCE[:, 0].tolist(), (9, 8, 8), strict=True)
    assert found == [search_by_hand(net, *each, alpha, beam_size) for each in sentences]
    if beam_size == 1:
        assert greedy_search(net, SOURCE, extra_length=6) == found


def test_beam_search_drops_finished_sentences() -> None:
    net = WrittenOdds(9, sharpness=5)
    source = torch.arange(3, 23)[:, None]
    beam_search(net, source, beam_size=3, extra_length=10)
    assert net.rows_asked[0] == 20  # one each: nothing has been written that could differ
    assert net.rows_asked[1:] == sorted(net.rows_asked[1:], reverse=True)
    assert all(rows % 3 == 0 for rows in net.rows_asked[1:])
    assert len(set(net.rows_asked[1:])) > 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_beam_search_ends_for_a_diverged_network(bad: float) -> None:
    found = beam_search(WrittenOdds(sharpness=bad), SOURCE, extra_length=4)
    assert [len(translation) <= 7 for translation in found] == [True] * 3
    assert {PAD, BOS, EOS}.isdisjoint({token for row in found for token in row})


@pytest.mark.parametrize(
    ("search", "source", "options", "message"),
    [
        (greedy_search, SENTENCES[0], {}, r"source is \(N, S\) tokens of int64, got \(5,\) of t"),
        (greedy_search, SENTENCES.float(), {}, r"got \(3, 5\) of torch\.float32"),
        (greedy_search, SOURCE * torch.tensor([[1], [0], [1]]), {}, "but padding in row 1: end it"),
        (greedy_search, SOURCE, {"extra_length": -1}, "a whole number of at least 0, got -1"),
        (beam_search, SOURCE, {"extra_length": 1.5}, "extra_length must be a whole .* got 1.5"),
        (beam_search, SOURCE, {"beam_size": 0}, "beam_size must be a whole number of at least 1"),
        (beam_search, SOURCE, {"length_penalty": -0.1}, "must be a number of at least 0, got -0.1"),
        (beam_search, SOURCE, {"length_penalty": "0.6"}, "length_penalty must be .* got '0.6'"),
        (beam_search, SOURCE, {"length_penalty": math.nan}, "length_penalty must be .* got nan"),
    ],
)
def test_search_refuses_bad_input(
    search: Any, source: Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        search(WrittenOdds(), source, **options)
