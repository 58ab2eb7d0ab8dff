"""The order and the draws: reproducible, different each epoch, and shared out among ranks."""

import pytest
import torch
from torch import Tensor

from nmlightning.datamodules.batches import (
    WHOLE_SET,
    Augmentation,
    AugmentedShuffle,
    EvaluationBatches,
    RawBatch,
    Shard,
)
from nmlightning.datamodules.image_data import LabelledImages
from nmlightning.datamodules.training_batches import TrainingBatches
from nmlightning.errors import InputError

AUGMENTATION = Augmentation(pad=4, flip=True)


def make_data(length: int) -> LabelledImages:
    """Return images whose label is their row, so that a batch tells what it holds."""
    return LabelledImages(torch.zeros(length, 1, 2, 2, dtype=torch.uint8), torch.arange(length))


def make_batches(
    length: int = 50,
    batch_size: int = 8,
    *,
    seed: int = 0,
    epoch: int = 0,
    shard: Shard = WHOLE_SET,
) -> list[RawBatch]:
    sampler = AugmentedShuffle(length, batch_size, AUGMENTATION, seed=seed, shard=shard)
    sampler.set_epoch(epoch)
    batches = TrainingBatches(make_data(length), sampler)
    read = list(batches)
    assert len(read) == len(batches)
    return read


def join(batches: list[RawBatch]) -> Tensor:
    """Return one row per image: its label, its corner and whether it is mirrored."""
    columns = [
        torch.column_stack([batch.labels, batch.corners, batch.flips])  # type: ignore[list-item]
        for batch in batches
    ]
    return torch.cat(columns)


def test_shuffle_depends_on_seed_and_epoch_alone() -> None:
    drawn = [join(make_batches(seed=s, epoch=e)) for s, e in [(0, 0), (0, 1), (1, 0), (2**63, 0)]]
    assert torch.equal(join(make_batches(seed=0, epoch=1)), drawn[1])
    for first in range(len(drawn)):
        for second in range(first):
            for column in (0, slice(1, 3), 3):
                assert not torch.equal(drawn[first][:, column], drawn[second][:, column])


def test_shuffle_drops_the_incomplete_batch() -> None:
    batches = make_batches(length=50, batch_size=8)
    assert [len(batch.labels) for batch in batches] == [8] * 6
    assert len(join(batches)[:, 0].unique()) == 48


def test_shuffle_draws_evenly() -> None:
    drawn = join(make_batches(length=20_000, batch_size=100)).double()
    corners, flips = drawn[:, 1:3], drawn[:, 3]
    counts = torch.stack([torch.bincount(column.long(), minlength=9) for column in corners.T])
    # Binomial: 20,000/9 ± 44 and 0.5 ± 0.0035; five deviations.
    assert counts.shape == (2, 9)
    assert (counts - 20_000 / 9).abs().max() < 5 * 44
    assert flips.mean().item() == pytest.approx(0.5, abs=5 * 0.0035)


def test_shuffle_without_flip_mirrors_nothing() -> None:
    sampler = AugmentedShuffle(50, 8, Augmentation(pad=2, flip=False), seed=0)
    assert not any(draw.flips.any() for draw in sampler)


def test_shuffle_on_two_ranks_equals_one_with_twice_the_batch() -> None:
    one = make_batches(length=50, batch_size=8)
    ranks = [make_batches(length=50, batch_size=4, shard=Shard(rank, 2)) for rank in range(2)]
    for whole, first, second in zip(one, *ranks, strict=True):
        assert torch.equal(join([whole]), join([first, second]))


@pytest.mark.parametrize("world_size", [1, 3])
def test_shuffle_of_a_small_set_is_one_batch(world_size: int) -> None:
    for rank in range(world_size):
        batches = make_batches(length=7, batch_size=128, shard=Shard(rank, world_size))
        assert [len(batch.labels) for batch in batches] == [7 // world_size]


def test_training_batches_resume_after_the_batches_done() -> None:
    whole = make_batches()
    sampler = AugmentedShuffle(50, 8, AUGMENTATION, seed=0)
    batches = TrainingBatches(make_data(50), sampler, batches_done=lambda: 2)
    assert torch.equal(join(list(batches)), join(whole)), "nothing was resumed"
    batches.load_state_dict(batches.state_dict())
    assert torch.equal(join(list(batches)), join(whole[2:]))
    assert torch.equal(join(list(batches)), join(whole)), "only the first epoch is shorter"


@pytest.mark.parametrize("length", [1, 7, 8, 9, 33, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 128])
def test_evaluation_reads_every_image_once(length: int, world_size: int, batch_size: int) -> None:
    data = make_data(length)
    shards = [Shard(rank, world_size) for rank in range(world_size)]
    try:
        ranks = [list(EvaluationBatches(data, batch_size, shard)) for shard in shards]
    except InputError:
        assert length // world_size < -(-length // world_size) / batch_size + 1
        return
    assert len({len(batches) for batches in ranks}) == 1, "ranks must do the same number of steps"
    for sizes in ([len(batch.labels) for batch in batches] for batches in ranks):
        full = sizes[:-1] if sizes[-1] > 1 else sizes[:-2]  # one may have been given to the last
        assert full == [batch_size] * len(full)
        assert all(1 <= size <= batch_size for size in sizes)
    read = torch.cat([batch.labels for batches in ranks for batch in batches])
    assert torch.equal(read.sort().values, data.labels)
    if world_size == 1:
        assert torch.equal(read, data.labels), "in order"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_batches(2, shard=Shard(0, 3)), "2 images cannot be shared by 3 processes"),
        (lambda: EvaluationBatches(make_data(3), 1, Shard(0, 2)), "3 images cannot be shared by 2"),
    ],
)
def test_batches_refuse_too_few_images(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]
