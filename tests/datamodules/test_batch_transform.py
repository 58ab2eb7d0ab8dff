"""The transform of a whole batch against torchvision's functions, image by image."""

import pytest
import torch
from torchvision.transforms import functional as F

from nmlightning.datamodules.batches import RawBatch
from nmlightning.datamodules.image_data import BatchTransform, crop, mirror

MEAN, STD, PAD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 4


@pytest.fixture
def batch() -> RawBatch:
    images = torch.randint(256, (20, 3, 10, 12), dtype=torch.uint8)
    corners = torch.randint(2 * PAD + 1, (20, 2))
    corners[0], corners[1] = 0, 2 * PAD
    return RawBatch(images, torch.arange(20), corners, torch.arange(20) % 2 == 0)


def test_equals_torchvision_image_by_image(batch: RawBatch) -> None:
    x, y = BatchTransform(MEAN, STD, PAD)(batch)
    assert y is batch.labels
    assert batch.corners is not None
    assert batch.flips is not None
    for image, (top, left), flip, ours in zip(
        batch.images, batch.corners.tolist(), batch.flips, x, strict=True
    ):
        expected = F.crop(F.pad(image, PAD), top, left, 10, 12)
        expected = F.hflip(expected) if flip else expected
        expected = F.normalize(expected.float() / 255, MEAN, STD)
        # Values up to 3.5, rounded twice in float32.
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


def test_evaluation_only_normalises(batch: RawBatch) -> None:
    x, _ = BatchTransform(MEAN, STD, PAD)(RawBatch(batch.images, batch.labels))
    torch.testing.assert_close(x, F.normalize(batch.images / 255, MEAN, STD), rtol=0, atol=2e-6)


def test_the_middle_corner_changes_nothing(batch: RawBatch) -> None:
    middle = torch.full((20, 2), PAD)
    assert torch.equal(crop(batch.images, middle, PAD), batch.images)


def test_mirroring_twice_changes_nothing(batch: RawBatch) -> None:
    assert batch.flips is not None
    assert torch.equal(mirror(mirror(batch.images, batch.flips), batch.flips), batch.images)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_model_chooses_the_type(batch: RawBatch, dtype: torch.dtype) -> None:
    transform = BatchTransform(MEAN, STD, PAD)
    x, _ = transform(batch, dtype)
    assert x.dtype == dtype
    eps = torch.finfo(dtype).eps  # of an error in each of 255, scale and shift, on values up to 3.5
    torch.testing.assert_close(x.float(), transform(batch)[0], rtol=0, atol=max(8 * eps, 2e-6))
