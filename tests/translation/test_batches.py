"""Which sentences a process reads: everything once, and on every rank as many batches."""

from itertools import chain

import pytest
import torch

from made_sentences import make_pairs
from nmlightning.datamodules.training_batches import WHOLE_SET, Shard
from nmlightning.errors import InputError
from nmlightning.translation.batches import EvaluationSentences, ShuffledBatches, TrainingPairs
from nmlightning.translation.corpus import EncodedPairs, encode_pairs
from nmlightning.translation.sources import SentencePair
from nmlightning.translation.tokenizer import BOS, EOS, SMALLEST, JointBPE

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


def test_the_order_follows_from_seed_and_epoch() -> None:
    drawn = [draw(seed=seed, epoch=epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    assert drawn[0] == draw()
    assert len({str(rows) for rows in drawn}) == 3
    assert len({len(rows) for rows in drawn}) == 1
    assert all(sorted(chain.from_iterable(rows)) == list(range(len(PAIRS))) for rows in drawn)


def test_without_shuffling_every_epoch_is_the_first() -> None:
    assert draw(epoch=5, shuffle=False) == draw(epoch=0)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_take_the_batches_in_turn(world_size: int) -> None:
    whole = draw()
    ranks = [draw(shard=Shard(rank, world_size)) for rank in range(world_size)]
    steps = len(whole) // world_size
    assert [len(rows) for rows in ranks] == [steps] * world_size
    together = [rows for step in zip(*ranks, strict=True) for rows in step]
    assert together == whole[: steps * world_size]


def test_other_batches_are_left_over_in_each_epoch() -> None:
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


def test_only_the_source_of_a_long_pair_is_shortened_and_empty_ones_are_kept() -> None:
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


def test_too_few_batches_for_the_ranks() -> None:
    message = r"\d+ batches of 200 sentence pairs cannot be shared by 99 processes: use fewer"
    with pytest.raises(InputError, match=message):
        draw(shard=Shard(0, 99))


def test_the_state_says_what_the_order_follows_from() -> None:
    batches = ShuffledBatches(ENCODED, 600, "bytes", seed=3, shard=Shard(1, 2))
    assert batches.state_dict() == {
        "seed": 3,
        "tokens_a_batch": 600,
        "processes": 2,
        "tokenizer": "bytes",
        "pairs": 200,
        "digest": ENCODED.digest,
    }
    assert set(batches.follows_from) < set(batches.state_dict())
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
