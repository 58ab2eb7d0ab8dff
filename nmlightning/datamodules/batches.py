"""The rows and the augmentation of each batch of images, by seed, epoch and process."""

from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nmlightning.datamodules import training_batches
from nmlightning.datamodules.training_batches import WHOLE_SET, Shard
from nmlightning.errors import InputError

SHARDS_MIXED = 16  # a thousand images by nm shard's default, of which a batch takes some


def shuffle_rows(length: int, shard_size: int, generator: torch.Generator) -> Tensor:
    """Return the rows 0 … length − 1 in a random order that a reader of shards can keep up with.

    Where rows lie alone (`shard_size` 1) every order is equally likely. Otherwise the shards, runs
    of `shard_size` rows, are shuffled, and then the rows within each `SHARDS_MIXED` successive
    ones, so that a batch takes its rows from at most about that many.
    """
    if shard_size == 1:
        return torch.randperm(length, generator=generator)
    shards = torch.split(torch.arange(length), shard_size)
    order = torch.randperm(len(shards), generator=generator).tolist()
    mixed = [
        torch.cat([shards[shard] for shard in order[first : first + SHARDS_MIXED]])
        for first in range(0, len(order), SHARDS_MIXED)
    ]
    return torch.cat([rows[torch.randperm(len(rows), generator=generator)] for rows in mixed])


class Augmentation(NamedTuple):
    """The augmentation of a training image: a shift by up to ±`pad` pixels, and a mirroring."""

    pad: int
    flip: bool


NO_AUGMENTATION = Augmentation(pad=0, flip=False)


class Draw(NamedTuple):
    """The random numbers of a batch; in evaluation, where nothing is random, `rows` alone.

    rows (B,), crop corners (B, 2) in 0 … 2·pad, mirrored (B,), and a seed for each image (B,), for
    data that draw their augmentation themselves.
    """

    rows: Tensor
    corners: Tensor | None = None
    flips: Tensor | None = None
    seeds: Tensor | None = None


class RawBatch(NamedTuple):
    """A batch before the arithmetic; `corners` and `flips` are None if none is left to do."""

    images: Tensor
    labels: Tensor
    corners: Tensor | None = None
    flips: Tensor | None = None


class ImageRows(Protocol):
    """Labelled images, a row each."""

    @property
    def length(self) -> int:
        """The number of images."""

    @property
    def shard_size(self) -> int:
        """The number of rows that are best read together; 1 if each is read alone."""

    @property
    def digest(self) -> str:
        """A short text that differs if the images are others or in another order."""


class ImageSource(ImageRows, Protocol):
    """Labelled images, read in batches."""

    def batches(self, draws: Iterable[Draw]) -> Iterator[RawBatch]:
        """Yield the batch of each draw, in their order."""


LARGEST_SEED = 2**63 - 1  # of an int64


def images_a_batch(length: int, batch_size: int, processes: int) -> int:
    """Return the images of each training batch on each process: of a small set all that it has."""
    return min(batch_size, length // processes)


@dataclass
class AugmentedShuffle(training_batches.EpochOrder):
    """The order and the augmentation of one epoch, drawn from (seed, epoch) and nothing else.

    All ranks draw the same numbers for the whole epoch and each takes its own part of every batch:
    W ranks with batch size B see what one process with batch size W·B sees, in rank order. The
    last, incomplete batch is dropped, as in the paper's code; a set that is smaller than one batch
    is a single batch. `shuffle` = False keeps the images in order (Lightning's `overfit_batches`),
    rows that lie together are a `shard_size` (see `shuffle_rows`), and the `digest` identifies the
    images when a run is resumed.
    """

    length: int
    batch_size: int
    augmentation: Augmentation
    _: KW_ONLY
    seed: int
    shard: Shard = WHOLE_SET
    shuffle: bool = True
    shard_size: int = 1
    digest: str = ""
    epoch: int = 0

    def __post_init__(self) -> None:
        processes = self.shard.world_size
        if self.length < processes:
            raise InputError(f"{self.length} images cannot be shared by {processes} processes.")
        self.batch_size = images_a_batch(self.length, self.batch_size, processes)

    def __len__(self) -> int:
        return self.length // self.world_batch

    @property
    def world_batch(self) -> int:
        """Images a batch on all ranks together."""
        return self.batch_size * self.shard.world_size

    def terms(self) -> dict[str, tuple[int | str, str]]:
        return {
            "images": (self.length, "images"),
            "shard_size": (self.shard_size, "images a shard"),
            "world_batch": (self.world_batch, "images a batch on all processes"),
            "digest": (self.digest, "of other images, by their names, labels or order"),
        }

    def __iter__(self) -> Iterator[Draw]:
        epoch = self._draw_epoch()
        world_batch = self.world_batch
        first = self.shard.rank * self.batch_size
        for start in range(first, first + len(self) * world_batch, world_batch):
            part = slice(start, start + self.batch_size)
            yield Draw(*(drawn[part] for drawn in epoch))

    def _draw_epoch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = training_batches.epoch_generator(self.seed, self.epoch)
        rows = shuffle_rows(self.length, self.shard_size, generator)
        if not self.shuffle:
            rows = torch.arange(self.length)
        positions = 2 * self.augmentation.pad + 1
        corners = torch.randint(positions, (self.length, 2), generator=generator)
        flips = torch.randint(2, (self.length,), generator=generator).bool()
        seeds = torch.randint(LARGEST_SEED, (self.length,), generator=generator)
        return rows, corners, flips & self.augmentation.flip, seeds


class EvaluationBatches:
    """Iterates over raw batches in order, every image once, also with several processes.

    Nothing is padded or repeated. Rank r of W reads images r, r + W, r + 2W, …, in full batches and
    one of what is left, since a compiled network is compiled for each size. All ranks do the same
    number of steps, which collective operations rely on: where that leaves one nothing for its
    last, the batch before gives it an image.
    """

    def __init__(self, data: ImageSource, batch_size: int, shard: Shard = WHOLE_SET) -> None:
        length = data.length
        largest = -(-length // shard.world_size)
        self.data = data
        self.batch_size = batch_size
        self.shard = shard
        self.batches = -(-largest // batch_size)
        if length // shard.world_size < self.batches:
            raise InputError(
                f"{length} images cannot be shared by {shard.world_size} processes in batches of "
                f"{batch_size}: use fewer processes or a larger batch."
            )

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[RawBatch]:
        rows = torch.arange(self.shard.rank, self.data.length, self.shard.world_size)
        last = min((self.batches - 1) * self.batch_size, len(rows) - 1)
        parts = (*torch.split(rows[:last], self.batch_size), rows[last:])
        yield from self.data.batches(Draw(part) for part in parts if len(part))
