"""Batches of sentences: within the bound of tokens, and shared out among ranks."""

from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from made_sentences import make_pairs
from nmlightning.datamodules.training_batches import WHOLE_SET, Shard
from nmlightning.errors import InputError
from nmlightning.translation.batches import (
    EvaluationSentences,
    ShuffledBatches,
    TrainingPairs,
    cut_sorted,
    plan_batches,
)
from nmlightning.translation.corpus import EncodedPairs, encode_pairs
from nmlightning.translation.sources import SentencePair
from nmlightning.translation.tokenizer import BOS, EOS, SMALLEST, JointBPE

Lengths = NDArray[np.int64]


def make_lengths(pairs: int, seed: int = 0) -> tuple[Lengths, Lengths]:
    """Return lengths like those of sentences: skewed, and of one pair alike."""
    draw_plan = np.random.default_rng(seed)
    source = draw_plan.gamma(4, 5, pairs).astype(np.int64) + 1
    return source, (source * draw_plan.normal(1, 0.15, pairs)).clip(1).astype(np.int64) + 1


def draw_plan(plan: object, seed: int = 0) -> list[torch.Tensor]:
    return plan.draw(torch.Generator().manual_seed(seed))  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("tokens", [1, 60, 500, 10**9])
@pytest.mark.parametrize("pairs", [1, 2, 3000])
def test_batch_plan_has_every_pair_once_within_the_bound(pairs: int, tokens: int) -> None:
    source, target = make_lengths(pairs)
    plan = plan_batches(source, target, tokens)
    for seed in range(3):
        batches = draw_plan(plan, seed)
        assert len(batches) == len(plan), "as many in every epoch"
        assert torch.cat(batches).sort().values.tolist() == list(range(pairs))
        for rows in batches:
            longest = max(source[rows].max(), target[rows].max())
            assert len(rows) * longest <= tokens or len(rows) == 1


def test_cut_sorted_fills_every_batch() -> None:
    draw_lengths = np.random.default_rng(0)
    for _ in range(200):
        lengths = np.sort(draw_lengths.integers(1, 40, draw_lengths.integers(1, 50)))
        bounds = cut_sorted(lengths, 60)
        assert bounds[0] == 0
        assert bounds[-1] == len(lengths)
        for start, end in pairwise(bounds):
            assert (end - start) * lengths[end - 1] <= 60
            assert end == len(lengths) or (end + 1 - start) * lengths[end] > 60


def test_cut_sorted_makes_no_batch_of_nothing() -> None:
    assert cut_sorted(np.array([], np.int64), 60) == [0]
    assert len(plan_batches(*make_lengths(0), 60)) == 0


def test_batch_plan_draw_depends_on_the_generator_alone() -> None:
    plan = plan_batches(*make_lengths(3000), 500)
    first, again, other = draw_plan(plan, 0), draw_plan(plan, 0), draw_plan(plan, 1)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    batches = [{tuple(sorted(rows.tolist())) for rows in drawn} for drawn in (first, other)]
    assert len(batches[0] & batches[1]) < len(plan) / 4, "other pairs come together"
    longest = np.maximum(*make_lengths(3000))
    lengths = [longest[rows].max() for rows in first]
    assert lengths != sorted(lengths), "short and long batches are mixed"


@pytest.mark.parametrize(("tokens", "most"), [(500, 0.03), (4000, 0.05), (25000, 0.08)])
def test_batch_plan_pads_little(tokens: int, most: float) -> None:
    source, target = make_lengths(60_000)
    real = padded = 0
    for rows in draw_plan(plan_batches(source, target, tokens)):
        for side in (source[rows], target[rows]):
            real += side.sum()
            padded += len(rows) * side.max()
    assert 1 - real / padded < most


BYTES = JointBPE.train(["x"], vocab_size=SMALLEST)

PAIRS = make_pairs(200)

ENCODED = encode_pairs(PAIRS, BYTES)


def draw(
    pairs: EncodedPairs = ENCODED,
    *,
    seed: int = 0,
    epoch: int = 0,
    shard: Shard = WHOLE_SET,
    shuffle: bool = True,
) -> list[list[int]]:
    """Return the rows of each batch."""
    batches = ShuffledBatches(pairs, 600, "bytes", seed=seed, shard=shard, shuffle=shuffle)
    batches.set_epoch(epoch)
    rows = [batch.tolist() for batch in batches]
    assert len(rows) == len(batches)
    return rows


def test_shuffled_batches_depend_on_seed_and_epoch() -> None:
    drawn = [draw(seed=seed, epoch=epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    assert drawn[0] == draw() == draw(epoch=5, shuffle=False)
    assert len({str(rows) for rows in drawn}) == 3
    assert len({len(rows) for rows in drawn}) == 1
    assert all(sorted(chain.from_iterable(rows)) == list(range(len(PAIRS))) for rows in drawn)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_shuffled_batches_are_shared_in_turn_by_ranks(world_size: int) -> None:
    whole = draw()
    ranks = [draw(shard=Shard(rank, world_size)) for rank in range(world_size)]
    steps = len(whole) // world_size
    assert [len(rows) for rows in ranks] == [steps] * world_size
    together = [rows for step in zip(*ranks, strict=True) for rows in step]
    assert together == whole[: steps * world_size]


def test_shuffled_batches_leave_out_others_in_each_epoch() -> None:
    world_size = len(draw()) - 1
    left = [
        {*range(len(PAIRS))}
        - {
            row
            for rank in range(world_size)
            for row in draw(epoch=e, shard=Shard(rank, world_size))[0]
        }
        for e in range(4)
    ]
    assert len({frozenset(rows) for rows in left}) == 4


@pytest.mark.parametrize("length", [1, 5, 7, 64, 200])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("tokens", [10, 300, 10**6])
def test_evaluation_reads_every_sentence_once(length: int, world_size: int, tokens: int) -> None:
    pairs = PAIRS[:length]
    encoded = encode_pairs(pairs, BYTES)
    references = [pair.target for pair in pairs]
    shards = [Shard(rank, world_size) for rank in range(world_size)]
    if length < world_size:
        with pytest.raises(InputError, match=f"{length} sentence pairs cannot be shared by"):
            EvaluationSentences(encoded, references, tokens, 40, shards[0])
        return
    ranks = [EvaluationSentences(encoded, references, tokens, 40, shard) for shard in shards]
    assert len({len(batches) for batches in ranks}) == 1, "as many steps on every rank"
    restored: dict[int, str] = {}
    for batches in ranks:
        for batch, rows in zip(batches, batches.rows, strict=True):
            size = len(rows) * max(batch.source.shape[1], batch.target.shape[1])
            extra = bool(length % world_size)  # one pair more, where some are left over
            assert size * (len(rows) - extra) <= tokens * len(rows) or len(rows) <= 1 + extra
            assert batch.source.shape[1] <= 40 + 1
            assert BYTES.decode(batch.target.tolist()) == list(batch.references)
            restored |= dict(zip(rows.tolist(), batch.references, strict=True))
    assert [restored[row] for row in range(length)] == references


def test_evaluation_shortens_sources_alone_and_keeps_empty_pairs() -> None:
    pairs = [SentencePair("a" * 99, "b" * 99), SentencePair("", ""), SentencePair("c", " ")]
    batches = EvaluationSentences(encode_pairs(pairs, BYTES), ["b" * 99, "", " "], 20, 10)
    (longest, *rest) = batches
    assert BYTES.decode(longest.source.tolist()) == ["a" * 9], "and the space before"
    assert BYTES.decode(longest.target.tolist()) == ["b" * 99]
    read = {batch.references[i]: i for batch in rest for i in range(len(batch.source))}
    assert set(read) == {"", " "}
    empty = next(batch for batch in rest if "" in batch.references)
    row = empty.references.index("")
    assert empty.source[row, 0] == EOS
    assert empty.target[row, :2].tolist() == [BOS, EOS]


def test_shuffled_batches_refuse_too_few_for_the_ranks() -> None:
    message = r"\d+ batches of 200 sentence pairs cannot be shared by 99 processes: use fewer"
    with pytest.raises(InputError, match=message):
        draw(shard=Shard(0, 99))


def test_shuffled_batches_state_determines_the_order() -> None:
    batches = ShuffledBatches(ENCODED, 600, "bytes", seed=3, shard=Shard(1, 2))
    assert batches.state_dict() == {
        "seed": 3,
        "tokens_a_batch": 600,
        "processes": 2,
        "tokenizer": "bytes",
        "pairs": 200,
        "digest": ENCODED.digest,
    }
    assert torch.equal(next(iter(batches)), next(iter(batches)))


def test_batches_for_a_cuda_device_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    (batch,) = TrainingPairs(ENCODED, pin_memory=True).batches([torch.arange(3)])
    assert [id(side) for side in pinned] == [id(side) for side in batch[:3]]
    references = [pair.target for pair in PAIRS]
    for batch in EvaluationSentences(ENCODED, references, 600, 40, pin_memory=True):
        assert batch.references
        assert pinned[-1] is batch.words
