"""Images that lie on the device that trains, padded once, of which a batch is one gather.

The numbers that were drawn for an epoch go to the device in one copy; after that nothing travels.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from nmlightning.datamodules.batches import NO_AUGMENTATION, Augmentation, Draw, RawBatch
from nmlightning.datamodules.in_memory import LabelledImages


class ResidentImages:
    """Labelled images on a device, with every crop of every image as a view.

    They take N·C·(H + 2·pad)·(W + 2·pad) bytes there, and twice that if they are mirrored: the
    mirror images lie behind the others, so that a flip is another row of the same gather.

    Args:
        source: the images (N, C, H, W) uint8 and their labels.
        augmentation: what may be drawn for an image.
        device: where the batches are wanted.

    Attributes:
        source: as given.
        windows: the view (N or 2N, C, 2·pad + 1, 2·pad + 1, H, W).
        labels: (N or 2N,), on the device.
    """

    def __init__(
        self,
        source: LabelledImages,
        augmentation: Augmentation = NO_AUGMENTATION,
        device: torch.device | None = None,
    ) -> None:
        self.source = source
        self.augmentation = augmentation
        self.device = device or torch.device("cpu")
        height, width = source.images.shape[-2:]
        images, self.labels = (tensor.to(self.device) for tensor in source)
        padded = F.pad(images, (augmentation.pad,) * 4)
        if augmentation.flip:
            padded = torch.cat([padded, padded.flip(-1)])
            self.labels = self.labels.repeat(2)
        self.windows = padded.unfold(2, height, 1).unfold(3, width, 1)

    @property
    def length(self) -> int:
        return self.source.length

    @property
    def shard_size(self) -> int:
        return self.source.shard_size

    @property
    def digest(self) -> str:
        return self.source.digest

    def batches(self, draws: Iterable[Draw]) -> Iterator[RawBatch]:
        """Yield the batch of each draw, cropped and mirrored already, in their order."""
        drawn = list(draws)
        if not drawn:
            return
        places = self._places(drawn).to(self.device)
        sizes = [len(draw.rows) for draw in drawn]
        columns = (*places, self.labels[places[0]])
        parts = (torch.split(column, sizes) for column in columns)
        for rows, tops, lefts, labels in zip(*parts, strict=True):
            yield RawBatch(self.windows[rows, :, tops, lefts], labels)

    def _places(self, drawn: list[Draw]) -> Tensor:
        """Return where in `windows` the images of all draws are: rows, tops and lefts (3, B)."""
        rows = torch.cat([draw.rows for draw in drawn])
        corners = [draw.corners for draw in drawn if draw.corners is not None]
        flips = [draw.flips for draw in drawn if draw.flips is not None]
        if not corners or not flips:
            middle = torch.full_like(rows, self.augmentation.pad)
            return torch.stack([rows, middle, middle])
        tops, lefts = torch.cat(corners).unbind(1)
        mirrored = torch.cat(flips)
        # A mirror image is cropped as far from the right as the image is from the left.
        lefts = torch.where(mirrored, 2 * self.augmentation.pad - lefts, lefts)
        return torch.stack([rows + self.length * mirrored, tops, lefts])
