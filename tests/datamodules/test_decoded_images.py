"""Damaged images, and files that are none: an error or skipped, never a crash in mid-training."""

import pickle
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nmlightning.datamodules.batches import RawBatch
from nmlightning.datamodules.decoded_images import DamagedImage, EncodedImage, decode
from nmlightning.datamodules.imagenet import ImageNet
from nmlightning.errors import InputError
from nmlightning.tasks.classification import ImageClassifier
from trainers import quiet_trainer

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")


def open_images(root: Path, num_workers: int = 0, batch_size: int = 4) -> ImageNet:
    data = ImageNet(str(root), batch_size, num_workers, image_size=32, damaged="skip")
    data.setup("fit")
    return data


def read_training(data: ImageNet, epoch: int = 0) -> list[RawBatch]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def same(first: list[RawBatch], second: list[RawBatch]) -> bool:
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        for a, b in zip(first, second, strict=True)
    )


# From 3.12 on Python warns of forking where threads run, as torch's do; workers use none of them.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_replaces_a_damaged_image_by_the_next(
    image_folder: Path, num_workers: int
) -> None:
    """As if the file of the next were there twice: same batches, same augmentation."""
    damaged = [image_folder / "train" / "b" / f"{number}.JPEG" for number in (1, 2)]
    for path in damaged:
        path.write_bytes((image_folder / "train/b/3.JPEG").read_bytes())
    expected = read_training(open_images(image_folder))
    damaged[0].write_bytes(b"")
    damaged[1].write_bytes(damaged[1].read_bytes()[:400])
    data = open_images(image_folder, num_workers)
    with pytest.warns(UserWarning, match="Skipped a damaged image") as warned:
        batches = read_training(data)
    assert [len(batch.labels) for batch in batches] == [4, 4, 4]
    assert same(batches, expected)
    text = sorted(str(warning.message) for warning in warned)
    assert [any(str(path) in line for line in text) for path in damaged] == [True, True]
    assert "1 of 12 so far" in text[0]
    assert "2 of 12 so far" in text[1]


def test_damaged_image_is_named_once(image_folder: Path) -> None:
    (image_folder / "train/a/0.JPEG").write_text("not an image")
    data = open_images(image_folder)
    with pytest.warns(UserWarning, match=r"train/a/0.JPEG \(of no known format\)\.$"):
        read_training(data)
    loader = data.train_dataloader()
    assert len(list(loader)) == 3, "and no second warning, which would be an error"


def test_training_replaces_the_last_image_by_the_first(image_folder: Path) -> None:
    (image_folder / "train/c/3.JPEG").write_bytes(b"")
    with pytest.warns(UserWarning, match="c/3.JPEG"):
        labels = torch.cat([batch.labels for batch in read_training(open_images(image_folder))])
    assert labels.bincount().tolist() == [5, 4, 3]


def test_evaluation_leaves_out_a_damaged_image(image_folder: Path) -> None:
    (image_folder / "val/b/0.JPEG").write_bytes(b"")
    with pytest.warns(UserWarning, match="1 of 6 so far: .*val/b/0.JPEG"):
        batches = list(open_images(image_folder).val_dataloader())
    assert [batch.labels.tolist() for batch in batches] == [[0, 0, 1], [2, 2]]
    (image_folder / "val/b/1.JPEG").write_bytes(b"")
    with pytest.raises(InputError, match=r"no image of a batch can be read, such as .*/val/b/"):
        list(open_images(image_folder, batch_size=1).val_dataloader())


def test_folder_reports_files_that_are_no_images(image_folder: Path) -> None:
    for name in ("train/a/notes.txt", "train/c/Thumbs.db", "train/readme.md"):
        (image_folder / name).touch()
    message = r"^{}/train holds files that are not images by their names, 2 in all: a/notes.txt, c/"
    with pytest.raises(InputError, match=message.format(image_folder)):
        ImageNet(str(image_folder)).setup("fit")
    with pytest.warns(UserWarning, match=r"names, 2 in all: a/notes.txt, c/Thumbs.db$"):
        data = open_images(image_folder)
    assert data.train.length == 12


@pytest.mark.usefixtures("_forks")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Skipped a damaged image")
def test_damaged_images_keep_two_processes_in_step(image_folder: Path) -> None:
    """Rank 0 alone meets the damaged images, in training and in validation."""
    for name in ("train/a/1.JPEG", "train/c/0.JPEG", "val/a/0.JPEG"):
        (image_folder / name).write_bytes(b"")
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32**2, 3))
    task = ImageClassifier(net, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.01))
    trainer = quiet_trainer(max_epochs=2, strategy="ddp_fork", devices=2)
    trainer.fit(task, ImageNet(str(image_folder), 2, num_workers=0, image_size=32, damaged="skip"))
    for name in ("train/loss", "val/loss"):
        assert trainer.callback_metrics[name].isfinite()


@pytest.mark.parametrize("image_format", FORMATS)
# Pillow's, of images that are said to be huge, and of entries that are cut off.
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore::UserWarning")
def test_decode_raises_damaged_image_for_any_damage(image_format: str) -> None:
    draw = np.random.default_rng(0)
    file = BytesIO()
    Image.fromarray(draw.integers(256, size=(20, 20, 3), dtype=np.uint8)).save(file, image_format)
    whole = np.frombuffer(file.getvalue(), dtype=np.uint8)
    errors = []
    for _ in range(200):
        content = whole.copy()
        content[draw.integers(60, size=3)] = draw.integers(256, size=3)
        try:
            decode(EncodedImage("it", BytesIO(content[: draw.integers(len(whole))].tobytes()), 0))
        except DamagedImage as error:
            errors.append(error)
    assert len(errors) > 100
    text = [str(error) for error in errors]
    assert "BytesIO" not in "".join(text), "an address in memory, which is another each time"
    assert [str(pickle.loads(pickle.dumps(error))) for error in errors] == text


def encode(image: Image.Image, **options: object) -> EncodedImage:
    file = BytesIO()
    image.save(file, "PNG", **options)
    return EncodedImage("it", file, 0)


@pytest.mark.parametrize("transparency", [bytes([0, 128, 255]), 1])
def test_decode_drops_transparency_without_a_warning(transparency: object) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    decoded = decode(encode(image, transparency=transparency))
    assert (decoded.mode, decoded.getpixel((0, 0))) == ("RGB", (40, 50, 60))


@pytest.mark.parametrize(
    ("size", "thin"), [((2, 200), ""), ((2, 201), "2×201"), ((101, 1), "101×1")]
)
def test_decode_refuses_a_thin_image(size: tuple[int, int], thin: str) -> None:
    """Resized for evaluation, 2×20,000 pixels would be 256×2,560,000."""
    image = encode(Image.new("RGB", size))
    if not thin:
        assert decode(image).size == size
        return
    with pytest.raises(DamagedImage) as error:
        decode(image)
    assert error.value.reason == f"{thin}, one side over 100 times the other"


@pytest.mark.parametrize(
    ("image_format", "dtype"),
    [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("PPM", "<u2"), ("JPEG2000", "<u2")],
)
def test_decode_keeps_the_high_bytes_of_16_bit_greys(image_format: str, dtype: str) -> None:
    greys = np.array([[0, 255, 256, 32768, 65535]], dtype=dtype)
    file = BytesIO()
    Image.fromarray(greys).save(file, image_format)
    decoded = np.asarray(decode(EncodedImage("it", file, 0)))
    assert decoded.tolist() == [[[grey] * 3 for grey in (0, 0, 1, 128, 255)]]


@pytest.mark.parametrize(
    ("image_format", "dtype", "mode"),
    [("TIFF", "i4", "I"), ("TIFF", "f4", "F"), ("PPM", "f4", "F")],
)
def test_decode_refuses_greys_of_unknown_white(image_format: str, dtype: str, mode: str) -> None:
    file = BytesIO()
    Image.fromarray(np.ones((2, 2), dtype)).save(file, image_format)
    with pytest.raises(DamagedImage, match=rf"32-bit greys \(mode {mode}\) have no known white"):
        decode(EncodedImage("it", file, 0))
