"""Decodes token by token: beam search with a length penalty, and greedy search."""

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from nmlightning.errors import InputError, check_whole_number, is_number
from nmlightning.translation.tokenizer import BOS, EOS, PAD


class DecoderState(Protocol):
    """The state of a network between two tokens; a row a translation."""

    def select(self, rows: Tensor) -> None:
        """Keep these rows, (M,) int64, in this order; any may be left out or repeated."""


State = TypeVar("State", bound=DecoderState)


class SequenceModel(Protocol[State]):
    """`Transformer`, `AttentionLSTM`, or a network of the same interface."""

    vocab_size: int
    training: bool

    def begin(self, source: Tensor) -> State:
        """Encode (N, S) source tokens."""

    def next_logits(self, tokens: Tensor, state: State) -> Tensor:
        """Write (N,) tokens, BOS first, into `state`; returns the next (N, vocab_size) logits."""


def longest_translations(net: SequenceModel[State], source: Tensor, extra_length: int) -> Tensor:
    """Return (N,) int64 the most tokens of each translation: `extra_length` over its source."""
    name = type(net).__name__
    check_whole_number("extra_length", extra_length, least=0)
    if net.training:
        raise InputError(f"{name} is in training mode, with dropout: call its eval() to search.")
    if source.dim() != 2 or source.dtype != torch.int64:
        raise InputError(
            f"source is (N, S) tokens of int64, got {tuple(source.shape)} of {source.dtype}."
        )
    lengths = (source != PAD).sum(1)
    empty = (lengths == 0).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"source has no token but padding in row {empty[0]}: end it with EOS.")
    return lengths + extra_length


def exclude_pad_and_bos(logits: Tensor) -> Tensor:
    """Return (N, vocab_size) logits in float32, −∞ for PAD and BOS and nowhere NaN.

    A network that has diverged then does not write them either.
    """
    allowed = logits.float().nan_to_num(nan=torch.finfo(torch.float32).min)
    allowed[:, [PAD, BOS]] = -torch.inf
    return allowed


Length = TypeVar("Length", int, Tensor)


def length_penalty_of(length: Length, alpha: float) -> Length:
    """Return ((5 + |Y|) / 6)^α, by which log P(Y) is divided.

    |Y| counts EOS. With α = 0 nothing is penalised; a larger α favours longer translations.
    Source: Wu et al. (2016), equation 14, https://arxiv.org/abs/1609.08144.
    """
    penalty: Length = ((5 + length) / 6) ** alpha
    return penalty


def check_length_penalty(alpha: float) -> float:
    """Return α if it is a finite number of at least 0, or raise InputError."""
    if not (is_number(alpha) and 0 <= alpha < float("inf")):
        raise InputError(f"length_penalty must be a number of at least 0, got {alpha!r}.")
    return alpha


@torch.no_grad()
@parametrize.cached()  # Normalised weights are read at each token.
def beam_search(
    net: SequenceModel[State],
    source: Tensor,
    *,
    beam_size: int = 4,
    length_penalty: float = 0.6,
    extra_length: int = 50,
) -> list[list[int]]:
    """Translate each sentence by beam search.

        score(Y) = log P(Y | source) / ((5 + |Y|) / 6)^α

    At each step the `beam_size` likeliest translations without EOS stay in the beam. One that ends
    with EOS is finished if it is among the `beam_size` likeliest of all. A sentence is done, and
    leaves the batch, when `beam_size` are finished, when none in the beam could still have a better
    score, or at its limit. With a beam of 1 it is `greedy_search`. PAD and BOS are never written.

    Args:
        net: a sequence model, in evaluation mode.
        source: (N, S) int64, padded at the end.
        beam_size: translations in the beam.
        length_penalty: α, at least 0.
        extra_length: how many more tokens than the source, its EOS counted, a translation may have,
            its own EOS counted too. One that is cut off there counts only where none has ended.

    Returns:
        the tokens of the best translation of each sentence, without BOS and EOS.

    Raises:
        InputError: for a beam of less than 1 or a negative α; see also `longest_translations`.

    Examples:
        >>> from nmlightning.models import Transformer
        >>> net = Transformer(50, width=32, hidden=64, heads=2).eval()
        >>> len(beam_search(net, torch.tensor([[7, 8, 2], [9, 2, 0]])))
        2
    """
    check_whole_number("beam_size", beam_size)
    check_length_penalty(length_penalty)
    limits = longest_translations(net, source, extra_length)
    if not len(source):
        return []
    state = net.begin(source)
    beams = _Beams.start(source)
    finished = _Finished.start(source, limits, length_penalty)
    for length in range(1, int(limits.max()) + 1):
        logits = net.next_logits(beams.tokens[:, :, -1].flatten(), state)
        grown = beams.grow(exclude_pad_and_bos(logits.float().log_softmax(1)), 2 * beam_size)
        finished.add(grown, length, beam_size)
        beams = grown.without_ended(beam_size)
        beams = beams.keep(finished.find_open(beams, length, beam_size))
        if not len(beams.sentences):
            break
        state.select(beams.rows)
    return finished.translations


@dataclass(frozen=True)
class _Beams:
    """Translations that are being written, k of each of n sentences, the likeliest first."""

    sentences: Tensor  # (n,) which of the sentences they translate
    scores: Tensor  # (n, k) float32, their log-probabilities; −∞ for what cannot be
    tokens: Tensor  # (n, k, t) int64, from BOS on
    rows: Tensor  # (n·k,) the row of the step before that each continues

    @classmethod
    def start(cls, source: Tensor) -> "_Beams":
        """Return one translation for each sentence, of BOS alone."""
        sentences = torch.arange(len(source), device=source.device)
        scores = torch.zeros(len(source), 1, device=source.device)
        return cls(sentences, scores, torch.full_like(source[:, :1, None], BOS), sentences)

    def grow(self, log_p: Tensor, count: int) -> "_Beams":
        """Return the `count` likeliest translations that are longer by a token."""
        n, k, t = self.tokens.shape
        best, words = log_p.topk(min(count, log_p.shape[1]))  # log_p is (n·k, vocab_size)
        best = best.view(n, k, -1)
        totals = (self.scores[:, :, None] + best).flatten(1)
        scores, columns = totals.topk(min(count, best[0].numel()))
        parents = columns // best.shape[2]
        tokens = self.tokens.gather(1, parents[:, :, None].expand(-1, -1, t))
        words = words.view(n, -1).gather(1, columns)[:, :, None]
        firsts = torch.arange(0, n * k, k, device=columns.device)
        rows = (firsts[:, None] + parents).flatten()
        return _Beams(self.sentences, scores, torch.cat((tokens, words), 2), rows)

    def without_ended(self, count: int) -> "_Beams":
        """Return the `count` likeliest of those that have not ended."""
        open_scores = self.scores.masked_fill(self.tokens[:, :, -1] == EOS, -torch.inf)
        scores, columns = open_scores.topk(min(count, open_scores.shape[1]))
        tokens = self.tokens.gather(1, columns[:, :, None].expand(-1, -1, self.tokens.shape[2]))
        rows = self.rows.view(self.scores.shape).gather(1, columns).flatten()
        return _Beams(self.sentences, scores, tokens, rows)

    def keep(self, is_open: Tensor) -> "_Beams":
        """Return those of the sentences that are not done; `is_open` is (n,) bool."""
        rows = self.rows.view(self.scores.shape)[is_open].flatten()
        return _Beams(self.sentences[is_open], self.scores[is_open], self.tokens[is_open], rows)


@dataclass
class _Finished:
    """The best finished translation of each sentence so far, without BOS and EOS."""

    translations: list[list[int]]
    scores: Tensor  # (N,) divided by the penalty; −∞ where none has ended
    counts: Tensor  # (N,) how many have ended
    limits: Tensor  # (N,) int64, the most tokens of each
    alpha: float  # of the penalty

    @classmethod
    def start(cls, source: Tensor, limits: Tensor, alpha: float) -> "_Finished":
        """Return that of sentences without a finished translation."""
        scores = torch.full((len(source),), -torch.inf, device=source.device)
        return cls([[] for _ in source], scores, torch.zeros_like(limits), limits, alpha)

    def add(self, grown: _Beams, length: int, beam_size: int) -> None:
        """Count those of `length` tokens that end, and keep the best where it is the best yet."""
        first = grown.tokens[:, :beam_size]
        scores = grown.scores[:, :beam_size]
        ended = (first[:, :, -1] == EOS) & scores.isfinite()
        self.counts[grown.sentences] += ended.sum(1)
        penalised = (scores / length_penalty_of(length, self.alpha)).masked_fill(~ended, -torch.inf)
        best, places = penalised.max(1)
        better = (best > self.scores[grown.sentences]).nonzero().flatten()
        self.scores[grown.sentences[better]] = best[better]
        self._write(grown.sentences[better], first[better, places[better], 1:-1])

    def find_open(self, beams: _Beams, length: int, beam_size: int) -> Tensor:
        """Return which sentences are not done, (n,) bool, and keep what is cut off if need be."""
        limits, scores = self.limits[beams.sentences], self.scores[beams.sentences]
        # Log-probabilities only decrease: no score exceeds that of now at the longest length.
        bounds = beams.scores[:, 0] / length_penalty_of(limits, self.alpha)
        is_cut = length >= limits
        cut = (is_cut & scores.isneginf()).nonzero().flatten()
        self._write(beams.sentences[cut], beams.tokens[cut, 0, 1:])
        is_full = self.counts[beams.sentences] >= beam_size
        return ~(is_cut | is_full | (scores >= bounds))

    def _write(self, sentences: Tensor, tokens: Tensor) -> None:
        for sentence, translation in zip(sentences.tolist(), tokens.tolist(), strict=True):
            self.translations[sentence] = translation


@torch.no_grad()
@parametrize.cached()
def greedy_search(
    net: SequenceModel[State], source: Tensor, *, extra_length: int = 50
) -> list[list[int]]:
    """Translate each sentence by the likeliest token at each step, until that is EOS.

    A sentence leaves the batch when it is finished. PAD and BOS are never written.

    Args:
        net: a sequence model, in evaluation mode.
        source: (N, S) int64, padded at the end.
        extra_length: how many more tokens than the source, its EOS counted, a translation may have;
            there it is cut off.

    Returns:
        the tokens of each translation, without BOS and EOS.

    Raises:
        InputError: see `longest_translations`.

    Examples:
        >>> from nmlightning.models import Transformer
        >>> net = Transformer(50, width=32, hidden=64, heads=2).eval()
        >>> len(greedy_search(net, torch.tensor([[7, 8, 2], [9, 2, 0]])))
        2
    """
    limits = longest_translations(net, source, extra_length)
    found: list[list[int]] = [[] for _ in source]
    if not found:
        return found
    state = net.begin(source)
    sentences = torch.arange(len(source), device=source.device)
    tokens = torch.full_like(sentences, BOS)
    for length in range(1, int(limits.max()) + 1):
        tokens = exclude_pad_and_bos(net.next_logits(tokens, state)).argmax(1)
        for sentence, token in zip(sentences.tolist(), tokens.tolist(), strict=True):
            if token != EOS:
                found[sentence].append(token)
        rows = ((tokens != EOS) & (length < limits[sentences])).nonzero().flatten()
        if not len(rows):
            break
        if len(rows) < len(tokens):
            state.select(rows)
            sentences, tokens = sentences[rows], tokens[rows]
    return found
