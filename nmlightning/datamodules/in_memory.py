"""Images held in the host's memory as one uint8 tensor.

The host only picks rows; `BatchTransform` does the arithmetic on the training device. Images that
lie on that device are `ResidentImages`.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from nmlightning.datamodules.batches import Draw, RawBatch


class LabelledImages(NamedTuple):
    """Images (N, C, H, W) uint8 and their labels (N,) int64."""

    images: Tensor
    labels: Tensor

    @property
    def length(self) -> int:
        return len(self.labels)

    @property
    def shard_size(self) -> int:
        return 1

    @property
    def digest(self) -> str:
        return ""  # these sets are published ones, always the same

    def batches(self, draws: Iterable[Draw]) -> Iterator[RawBatch]:
        """Yield the batch of each draw, in their order."""
        for draw in draws:
            images, labels = self.images[draw.rows], self.labels[draw.rows]
            yield RawBatch(images, labels, draw.corners, draw.flips)
