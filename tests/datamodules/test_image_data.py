"""Batches transformed on the device: against torchvision, and ResidentImages against the host."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import functional as F

from nmlightning.datamodules.batches import (
    NO_AUGMENTATION,
    Augmentation,
    AugmentedShuffle,
    EvaluationBatches,
    RawBatch,
    Shard,
)
from nmlightning.datamodules.cifar10 import CIFAR10
from nmlightning.datamodules.digits import Digits
from nmlightning.datamodules.image_data import BatchTransform, LabelledImages, ResidentImages
from nmlightning.datamodules.imagenet import ImageNet
from nmlightning.datamodules.training_batches import TrainingBatches
from nmlightning.errors import InputError

MEAN, STD, PAD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 4


@pytest.fixture
def batch() -> RawBatch:
    images = torch.randint(256, (20, 3, 10, 12), dtype=torch.uint8)
    corners = torch.randint(2 * PAD + 1, (20, 2))
    corners[0], corners[1] = 0, 2 * PAD
    return RawBatch(images, torch.arange(20), corners, torch.arange(20) % 2 == 0)


def test_batch_transform_equals_torchvision(batch: RawBatch) -> None:
    x, y = BatchTransform(MEAN, STD, PAD)(batch)
    assert y is batch.labels
    for image, (top, left), flip, ours in zip(
        batch.images, batch.corners.tolist(), batch.flips, x, strict=True
    ):
        expected = F.crop(F.pad(image, PAD), top, left, 10, 12)
        expected = F.hflip(expected) if flip else expected
        expected = F.normalize(expected.float() / 255, MEAN, STD)
        # Values up to 3.5, rounded twice in float32.
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


def test_batch_transform_only_normalises_in_evaluation(batch: RawBatch) -> None:
    x, _ = BatchTransform(MEAN, STD, PAD)(RawBatch(batch.images, batch.labels))
    torch.testing.assert_close(x, F.normalize(batch.images / 255, MEAN, STD), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_batch_transform_returns_the_models_dtype(batch: RawBatch, dtype: torch.dtype) -> None:
    transform = BatchTransform(MEAN, STD, PAD)
    x, _ = transform(batch, dtype)
    assert x.dtype == dtype
    eps = torch.finfo(dtype).eps  # half of it is what rounding a value up to 4 adds, once
    torch.testing.assert_close(x.float(), transform(batch)[0], rtol=0, atol=max(1.01 * eps, 2e-6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batch_transform_keeps_all_grey_levels_in_half(dtype: torch.dtype) -> None:
    levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    given = RawBatch(levels, torch.zeros(1))
    transform = BatchTransform((0.48, 0.5, 0.49), (0.24, 0.25, 0.24), 0)
    x, exact = (transform(given, of)[0].double() for of in (dtype, torch.float64))
    assert [len(channel.unique()) for channel in x[0]] == [256] * 3
    assert (x - exact).abs().max() <= 2**-7  # 0.0078, half of what lies between two from 2 on
    assert (x - exact).mean().abs() < 1e-4


AUGMENTATIONS = [Augmentation(4, True), Augmentation(2, False), Augmentation(0, True)]


@pytest.fixture
def images() -> LabelledImages:
    return LabelledImages(
        torch.randint(256, (50, 3, 10, 12), dtype=torch.uint8), torch.randint(10, (50,))
    )


def read(source: Any, augmentation: Augmentation, shard: Shard, dtype: torch.dtype) -> list[Any]:
    """Return an epoch of batches as the model gets them."""
    sampler = AugmentedShuffle(source.length, 8, augmentation, seed=3, shard=shard)
    sampler.set_epoch(2)
    transform = BatchTransform(MEAN, STD, augmentation.pad)
    return [transform(batch, dtype) for batch in TrainingBatches(source, sampler)]


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("shard", [Shard(), Shard(1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_resident_images_train_as_on_the_host(
    images: LabelledImages, augmentation: Augmentation, shard: Shard, dtype: torch.dtype
) -> None:
    ours = read(ResidentImages(images, augmentation), augmentation, shard, dtype)
    theirs = read(images, augmentation, shard, dtype)
    assert len(ours) == len(theirs) == 6 // shard.world_size
    for (x, y), (expected, labels) in zip(ours, theirs, strict=True):
        assert torch.equal(x, expected)
        assert torch.equal(y, labels)
        assert x.is_contiguous()


@pytest.mark.parametrize("shard", [Shard(), Shard(1, 3)])
def test_resident_images_evaluate_as_on_the_host(images: LabelledImages, shard: Shard) -> None:
    ours, theirs = (
        list(EvaluationBatches(source, 8, shard)) for source in (ResidentImages(images), images)
    )
    for batch, expected in zip(ours, theirs, strict=True):
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.labels, expected.labels)


def test_resident_images_of_an_empty_epoch(images: LabelledImages) -> None:
    assert list(ResidentImages(images).batches([])) == []


class Copies(TorchDispatchMode):
    """Counts the copies from one place or type to another, and all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.copies += func is torch.ops.aten._to_copy.default
        self.operations += 1
        return func(*args, **(kwargs or {}))


def test_resident_images_copy_once_an_epoch(images: LabelledImages) -> None:
    augmentation = AUGMENTATIONS[0]
    resident = ResidentImages(images, augmentation, torch.device("meta"))
    draws = list(AugmentedShuffle(50, 1, augmentation, seed=0))
    with Copies() as mode:
        batches = resident.batches(draws)
        first = next(batches)
        once = mode.operations
        others = list(batches)
    assert first.images.device.type == "meta"
    assert len(others) == 49
    assert mode.copies == 1
    assert mode.operations - once <= 7 * 49, "some views and a gather"


def test_resident_images_memory(images: LabelledImages) -> None:
    resident = ResidentImages(images, Augmentation(4, True))
    assert resident.windows.untyped_storage().nbytes() == 2 * 50 * 3 * 18 * 20
    plain = ResidentImages(images)
    assert plain.windows.untyped_storage().nbytes() == 50 * 3 * 10 * 12


@pytest.mark.parametrize("image_size", [8, 32])  # without padding both parts are placed alike
def test_image_data_places_its_images_once(image_size: int) -> None:
    data = Digits(image_size=image_size)
    data.setup("fit")
    train, validation = data.train_dataloader().data, data.val_dataloader().data
    assert isinstance(train, ResidentImages)
    assert data.train_dataloader().data is train
    assert data.test_dataloader().data is data.predict_dataloader().data is validation
    assert (train.source, validation.source) == (data.train, data.validation)
    data.teardown("fit")
    assert data.train_dataloader().data is not train


def test_image_data_reads_on_the_host() -> None:
    data = Digits(device_resident=False)
    data.setup("fit")
    assert data.train_dataloader().data is data.train
    assert data.val_dataloader().data is data.validation
    with pytest.raises(InputError, match="device_resident is True or False, got 'gpu'"):
        CIFAR10(device_resident="gpu")  # type: ignore[arg-type]


def test_resident_images_train_after_inference_mode(images: LabelledImages) -> None:
    transform = BatchTransform(MEAN, STD, 0)
    resident = ResidentImages(images)
    with torch.inference_mode():
        for batch in EvaluationBatches(resident, 8):
            transform(batch)
    x: Tensor = next(iter(read(resident, NO_AUGMENTATION, Shard(), torch.float32)))[0]
    weight = torch.ones(3, requires_grad=True)
    (x.sum((0, 2, 3)) * weight).sum().backward()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (CIFAR10, {"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        (CIFAR10, {"download": "no"}, "download is True or False, got 'no'"),
        (Digits, {"image_size": 7}, "image_size must be a whole number of at least 8, got 7"),
        (Digits, {"channels": 0}, "channels must be a whole number of at least 1, got 0"),
        (ImageNet, {"image_size": 0}, "image_size must be a whole number of at least 1, got 0"),
        (ImageNet, {"num_workers": -1}, "num_workers must be a whole number of at least 0, got -1"),
        (ImageNet, {"damaged": "ignore"}, "damaged is 'error' or 'skip', got 'ignore'"),
        (ImageNet, {"root": "hf://datasets/imagenet"}, "from addresses in s3://, .*local:; got"),
    ],
)
def test_image_data_refuse_bad_settings(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**options)
