"""Digits against scikit-learn's own arrays."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from nmlightning.datamodules.digits import Digits


def make_digits(**options: int) -> Digits:
    digits = Digits(**options)
    digits.prepare_data()
    digits.setup("fit")
    return digits


def test_digits_of_original_size_hold_the_original_pixels() -> None:
    digits = make_digits(image_size=8, channels=1)
    data = [digits.train, digits.validation]
    images = torch.cat([part.images for part in data]).flatten(1)
    labels = torch.cat([part.labels for part in data])
    ours = torch.column_stack([images.double() * 16 / 255, labels]).numpy().round()
    source = load_digits()
    theirs = np.column_stack([source.data, source.target])
    assert sorted(map(tuple, ours)) == sorted(map(tuple, theirs))


def test_digits_split_is_stratified_and_fixed() -> None:
    torch.manual_seed(1)
    first = make_digits(image_size=8)
    torch.manual_seed(2)
    second = make_digits(image_size=8)
    train, validation = first.train, first.validation
    assert (len(train.labels), len(validation.labels)) == (1437, 360)
    shares = torch.stack(
        [part.labels.bincount() / len(part.labels) for part in (train, validation)]
    )
    assert (shares[0] - shares[1]).abs().max() < 0.003  # one image of 360
    assert torch.equal(train.labels, second.train.labels)
    assert torch.equal(train.images, second.train.images)


@pytest.mark.parametrize(("image_size", "channels", "shift"), [(8, 1, 0), (32, 3, 2), (28, 1, 1)])
def test_digits_batches_fit_the_model(image_size: int, channels: int, shift: int) -> None:
    digits = make_digits(batch_size=64, image_size=image_size, channels=channels)
    batches = digits.train_dataloader()
    batch, draw = next(iter(batches)), next(iter(batches.sampler))
    assert draw.corners.unique().tolist() == list(range(2 * shift + 1))
    assert not draw.flips.any(), "a mirrored 3 is not a 3"
    x, y = digits.on_after_batch_transfer(batch, 0)
    assert x.shape == (64, channels, image_size, image_size) == (64, *digits.image_shape)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64


def test_digits_training_pixels_are_normalised() -> None:
    digits = make_digits(batch_size=2000, image_size=8)
    (batch,) = digits.train_dataloader()
    x, _ = digits.on_after_batch_transfer(batch, 0)
    assert x.mean().item() == pytest.approx(0, abs=1e-5)
    assert x.std().item() == pytest.approx(1, abs=1e-5)
