"""ImageNet on a tiny folder of generated JPEGs, and on real images where they are at hand."""

import itertools
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder

from nmlightning.datamodules.image_folder import FolderImages, common_classes
from nmlightning.datamodules.imagenet import ImageNet
from nmlightning.errors import InputError

SIZE = 32
MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])


def make_data(root: Path, **options: Any) -> ImageNet:
    settings = {"batch_size": 4, "num_workers": 0, "image_size": SIZE, **options}
    data = ImageNet(str(root), **settings)
    data.prepare_data()
    data.setup("fit")
    return data


def read_epoch(data: ImageNet, epoch: int = 0) -> tuple[Tensor, Tensor]:
    """Return the raw images and labels of a training epoch."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    batches = list(loader)
    assert len(batches) == len(loader)
    images, labels = zip(*((batch.images, batch.labels) for batch in batches), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_imagenet_batches_are_uint8_until_transformed(image_folder: Path) -> None:
    data = make_data(image_folder)
    for loader, lengths in ((data.train_dataloader(), [4, 4, 4]), (data.val_dataloader(), [4, 2])):
        batches = list(loader)
        assert [len(batch.labels) for batch in batches] == lengths
        for batch in batches:
            assert (batch.images.shape[1:], batch.images.dtype) == ((3, SIZE, SIZE), torch.uint8)
            x, y = data.on_after_batch_transfer(batch, 0)
            assert (x.shape, x.dtype) == (batch.images.shape, torch.float32)
            assert torch.equal(y, batch.labels)
    assert data.num_classes == 3
    assert data.image_shape == (3, SIZE, SIZE)


def test_imagenet_evaluation_equals_pillows(image_folder: Path) -> None:
    """Against Pillow and numpy: short side 32 · 256/224 = 37 pixels, then the middle 32."""
    data = make_data(image_folder)
    batch = next(iter(data.val_dataloader()))
    x, _ = data.on_after_batch_transfer(batch, 0)
    image = Image.open(sorted((image_folder / "val").glob("*/*"))[0])  # 50 wide, 40 high
    resized = image.resize((37 * 50 // 40, 37), Image.Resampling.BILINEAR)
    left, top = round((46 - 32) / 2), round((37 - 32) / 2)
    pixels = np.asarray(resized.crop((left, top, left + 32, top + 32))) / 255
    expected = torch.from_numpy((pixels - MEAN) / STD).permute(2, 0, 1)
    # float32 against float64
    torch.testing.assert_close(x[0].double(), expected, rtol=1e-6, atol=1e-6)


def test_imagenet_training_crops_and_mirrors(image_folder: Path) -> None:
    """The red of the image grows to the right, so that mirrored it grows to the left."""
    ramp = np.zeros((40, 50, 3), dtype=np.uint8)
    ramp[..., 0] = np.arange(0, 250, 5)
    for folder, number in itertools.product((image_folder / "train").iterdir(), range(32)):
        Image.fromarray(ramp).save(folder / f"{number}.JPEG", quality=95)
    red = read_epoch(make_data(image_folder))[0][:, 0].double().mean(1)
    span = red[:, -1] - red[:, 0]
    assert 0.3 < (span < 0).double().mean() < 0.7  # of 96; 0.2 is four deviations
    # Widths: a square or 4:3 of 8 to 100 % of the area.
    assert span.abs().min() < 100
    assert span.abs().max() > 150


def test_imagenet_crops_differ_by_epoch(image_folder: Path) -> None:
    data = make_data(image_folder)
    loader = data.train_dataloader()
    loader.sampler.shuffle = False
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        epochs.append(torch.cat([batch.images for batch in loader]))
    assert all(not torch.equal(first, second) for first, second in zip(*epochs, strict=True))


def test_imagenet_batch_is_in_the_drawn_order(image_folder: Path) -> None:
    data = make_data(image_folder)
    loader = data.train_dataloader()
    for draw, batch in zip(loader.sampler, loader, strict=True):
        assert torch.equal(batch.labels, draw.rows // 4), "of four images a class"


def test_imagenet_leaves_torchs_generator_alone(image_folder: Path) -> None:
    loader = make_data(image_folder).train_dataloader()
    states = []
    for _ in zip(range(3), loader, strict=False):
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[2])


# From 3.12 on Python warns of forking where threads run, as torch's do; workers use none of them.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_imagenet_workers_read_as_one_process(image_folder: Path) -> None:
    data = make_data(image_folder)
    read = [read_epoch(make_data(image_folder, num_workers=workers))[0] for workers in (0, 1)]
    assert torch.equal(*read)
    (damaged := next((image_folder / "train").glob("*/*"))).write_bytes(b"")
    data = make_data(image_folder, num_workers=1)
    with pytest.raises(InputError, match=f"^{damaged} cannot be read as an image .*$"):
        read_epoch(data)


def test_imagenet_counts_cores_by_default(image_folder: Path) -> None:
    with warnings.catch_warnings():  # torch's, of more workers than cores
        warnings.simplefilter("error")
        loader = make_data(image_folder, num_workers=None).train_dataloader()
    assert loader.data.num_workers >= 1  # type: ignore[attr-defined]


def test_folder_images_are_listed_as_by_torchvision(image_folder: Path) -> None:
    """Nested, through links, and without what is hidden, which torchvision is not shown."""
    nested = image_folder / "train" / "b"
    for name in ("deep/0.jpg", "deep-1/er/0.PNG", "a.webp", "deep/A.jpeg"):
        (nested / name).parent.mkdir(parents=True, exist_ok=True)
        (nested / name).touch()
    (nested / "linked").symlink_to(image_folder / "val" / "b")
    expected = ImageFolder(image_folder / "train")
    for name in (".ipynb_checkpoints", "b/.ipynb_checkpoints"):
        (image_folder / "train" / name).mkdir()
        shutil.copy(image_folder / "train/a/0.JPEG", image_folder / "train" / name)
    for name in ("a/.DS_Store", "b/._a.webp", ".DS_Store"):
        (image_folder / "train" / name).touch()
    images = FolderImages(image_folder / "train")
    assert (images.files, images.classes) == (expected.samples, expected.classes)
    assert len(images.files) == 18
    assert common_classes(image_folder / "train", image_folder / "val") == {"a", "b", "c"}


def remove(path: str) -> Callable[[Path], None]:
    return lambda root: shutil.rmtree(root / path)


def empty(path: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        shutil.rmtree(root / path)
        (root / path).mkdir()

    return damage


def link_val_to_train(root: Path) -> None:
    shutil.rmtree(root / "val")
    (root / "val").symlink_to(root / "train")


def link(name: str, target: str) -> Callable[[Path], None]:
    return lambda root: (root / name).symlink_to(target)


def add_classes(root: Path) -> None:
    for name in "defg":
        (root / "val" / name).mkdir()


def write_text(root: Path) -> None:
    (root / "val" / "b").joinpath("0.JPEG").write_text("not an image")


def cut_off(root: Path) -> None:
    path = root / "val" / "c" / "1.JPEG"
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove(""), "there is no folder {root}/train: give the folder that holds"),
        (remove("train"), "there is no folder {root}/train: give the folder that holds"),
        (remove("val"), "there is no folder {root}/val: give the folder that holds"),
        (empty("val"), "{root}/val holds no folders: put .* or give another folder"),
        (empty("train/b"), "{root}/train has no images of b: put some there, or delete the folder"),
        (empty("val/b"), "{root}/val has no images of b: put some there, or delete the folder of"),
        (link("val/a/self", "."), "{root}/val/a/self and {root}/val/a are the same folder,"),
        (link("val/b/up", ".."), "{root}/val/b/up and {root}/val are the same folder"),
        (link("val/c/a", "../a"), "{root}/val/c/a and {root}/val/a are the same folder, so its"),
        (remove("val/b"), "train has 3 classes and .*val 2, and they differ in b: make"),
        (add_classes, "train has 3 classes and .*val 7, and they differ in d, e, f and 1 more: "),
        (link_val_to_train, "{root}/train and {root}/val are the same folder"),
        (write_text, "{root}/val/b/0.JPEG cannot be read as an image .*: replace or delete it"),
        (cut_off, "{root}/val/c/1.JPEG cannot be read as an image .*: replace or delete it"),
    ],
)
def test_imagenet_refuses_folders(
    image_folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(image_folder)
    with pytest.raises(InputError, match=message.format(root=image_folder)) as error:
        list(make_data(image_folder).val_dataloader())
    assert "\n" not in str(error.value)


def test_imagenet_lists_training_images_only_to_train(image_folder: Path) -> None:
    data = ImageNet(str(image_folder))
    data.setup("validate")
    with pytest.raises(AssertionError):
        data.train_dataloader()
    assert data.test_dataloader().data.length == 6
    assert data.test_dataloader().data is data.predict_dataloader().data


@pytest.mark.real_data
def test_imagenet_real_images_are_about_standardised(data_root: Path) -> None:
    root = data_root / "imagenet-mini"
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    data = make_data(root, batch_size=200, image_size=64)
    (batch,) = data.val_dataloader()
    x, y = data.on_after_batch_transfer(batch, 0)
    assert y.bincount().tolist() == [20] * 10
    # Ten classes of 1,000, so about. The published deviation is the mean of those within an image.
    assert x.mean((0, 2, 3)).abs().max() < 0.2
    assert (x.std((2, 3)).mean(0) - 1).abs().max() < 0.1
