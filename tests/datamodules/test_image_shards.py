"""Shards hold what the folder holds, and are read alike by any number of workers."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nmlightning.cli import main
from nmlightning.datamodules.batches import SHARDS_MIXED, shuffle_rows
from nmlightning.datamodules.image_folder import FolderImages
from nmlightning.datamodules.image_shards import ShardedImages, read_index
from nmlightning.datamodules.imagenet import ImageNet
from nmlightning.errors import InputError

pytest.importorskip("litdata")
SHARD = 3  # images


@pytest.fixture
def shards(image_folder: Path, tmp_path: Path) -> Path:
    out = tmp_path / "shards"
    assert main(["shard", str(image_folder), str(out), "--shard_size", str(SHARD)]) == 0
    return out


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where litdata keeps what it has fetched, which is the home folder."""
    folder = tmp_path / "cache"
    monkeypatch.setattr("litdata.utilities.dataset_utilities._LITDATA_CACHE_DIR", str(folder))
    return folder


def open_images(root: object, **options: Any) -> ImageNet:
    settings = {"batch_size": 4, "num_workers": 0, "image_size": 32, **options}
    data = ImageNet(str(root), **settings)
    data.setup("fit")
    return data


def read_all(loader: Any) -> tuple[Tensor, Tensor]:
    batches = list(loader)
    assert len(batches) == len(loader)
    images, labels = zip(*((batch.images, batch.labels) for batch in batches), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_shards_hold_the_files(image_folder: Path, shards: Path) -> None:
    index = read_index(str(shards))
    assert index[:3] == (["a", "b", "c"], SHARD, {"train": 12, "val": 6})
    assert index.digests["val"] == FolderImages(image_folder / "val").digest
    for part, count in index.images.items():
        images = ShardedImages(str(shards), part, index)
        fetched = [images.fetch(row) for row in range(images.length)]
        content = {image.name: image.file.read() for image in fetched}  # type: ignore[union-attr]
        for name, read in content.items():
            assert read == (image_folder / Path(name).relative_to(shards)).read_bytes()
        assert len(content) == images.length == count
        assert {(Path(image.name).parent.name, image.label) for image in fetched} == {
            ("a", 0),
            ("b", 1),
            ("c", 2),
        }


def test_shards_validate_as_the_folder(image_folder: Path, shards: Path) -> None:
    data = [open_images(root) for root in (image_folder, shards)]
    assert [each.num_classes for each in data] == [3, 3]
    torch.testing.assert_close(*(read_all(each.val_dataloader()) for each in data), rtol=0, atol=0)


# From 3.12 on Python warns of forking where threads run, as torch's do; workers use none of them.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_shards_read_alike_by_workers_and_remotely(shards: Path, cache: Path) -> None:
    roots = [(str(shards), 0), (str(shards), 2), (f"local:{shards}", 0), (f"local:{shards}", 2)]
    first, *others = [
        read_all(open_images(root, num_workers=workers).train_dataloader())
        for root, workers in roots
    ]
    for other in others:
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])
    fetched = {path.relative_to(cache).name for path in cache.rglob("*.bin")}
    assert fetched == {f"chunk-0-{number}.bin" for number in range(4)}, "whole shards are kept"


def test_shards_are_fetched_whole(shards: Path, cache: Path) -> None:
    """Instead of two requests an image, which `local:`, alone among remotes, would hide."""
    root = f"local:{shards}"
    images = ShardedImages(root, "train", read_index(root))
    images.fetch(0)
    assert images._shards.on_demand_bytes is False


def test_shards_report_a_damaged_image(shards: Path) -> None:
    """Bits that have changed since it was written, which the size of the file does not tell."""
    (file,) = shards.glob("val/chunk-0-0.bin")
    content = bytearray(file.read_bytes())
    start = content.index(b"\xff\xd8\xff")  # of the first JPEG
    content[start : start + 2] = b"  "
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"shards/val/a/0.JPEG cannot be read .*\(of no known"):
        list(open_images(shards).val_dataloader())
    with pytest.warns(UserWarning, match=r"1 of 6 so far: .*shards/val/a/0.JPEG"):
        list(open_images(shards, damaged="skip").val_dataloader())


def test_shards_report_an_overwritten_file(shards: Path) -> None:
    """Of the right size, so that only reading tells; also its second item alone."""
    file = shards / "train" / "chunk-0-1.bin"
    whole = file.read_bytes()
    start = whole.index(b".JPEG", whole.index(b".JPEG") + 1) - 25  # the sizes of an item's parts
    index = read_index(str(shards))
    for content in (bytes(len(whole)), whole[:start] + b"\xff" * 50 + whole[start + 50 :]):
        file.write_bytes(content)
        images = ShardedImages(str(shards), "train", index)
        with pytest.raises(InputError, match=f"^{file} cannot be read .*: copy it again.$"):
            [images.fetch(row) for row in range(SHARD, 2 * SHARD)]


def remove(name: str) -> Callable[[Path], None]:
    return lambda root: (shutil.rmtree if (root / name).is_dir() else Path.unlink)(root / name)


def overwrite(name: str, content: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text(content)


def overwrite_the_only_item(root: Path) -> None:
    path = root / "classes" / "chunk-0-0.bin"
    path.write_bytes(path.read_bytes().replace(b'{"format"', b'("format"'))


def cut_off(root: Path) -> None:
    path = root / "train" / "chunk-0-2.bin"
    path.write_bytes(path.read_bytes()[:-1])


def link_val_to_train(root: Path) -> None:
    shutil.rmtree(root / "val")
    (root / "val").symlink_to(root / "train")


def age(root: Path) -> None:
    """Change the version, in the only item of the index."""
    path = root / "classes" / "chunk-0-0.bin"
    path.write_bytes(path.read_bytes().replace(b'"format": 2', b'"format": 1'))


def rename_format(part: str, before: str, after: str) -> Callable[[Path], object]:
    """Have litdata read the items of a part otherwise."""

    def rename(root: Path) -> None:
        path = root / part / "index.json"
        assert before in path.read_text()
        path.write_text(path.read_text().replace(before, after))

    return rename


FACTORY = "collections.defaultdict"  # of which litdata imports what its context names


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *(
            (rename_format(part, *change), f"{{root}}/{part}/index.json describes items of .* code")
            for part in ("classes", "train")
            for change in (('"bytes"', '"pickle"'), ("builtins.tuple", FACTORY))
        ),
        (remove("classes"), "{root}/classes holds no shards: write them again with nm shard"),
        (remove("train"), "{root}/train holds no shards: write them again"),
        (remove("val"), "{root}/val holds no shards: write them again"),
        (remove("train/index.json"), "{root}/train holds no shards: write them again"),
        (
            remove("train/chunk-0-1.bin"),
            "1 of 4 shards in {root}/train are absent or cut off, such as chunk-0-1.bin: copy",
        ),
        (cut_off, "1 of 4 shards in {root}/train are absent or cut off, such as chunk-0-2.bin"),
        (link_val_to_train, "{root}/val holds 12 images where 6 were written: it is from other"),
        *(
            (overwrite(f"{part}/index.json", text), f"{{root}}/{part}/index.json is cut off or da")
            for part in ("train", "classes")
            for text in ("", '{"chunks": [{"chunk_by', "{}", '{"chunks": null}', "[]")
        ),
        (overwrite_the_only_item, "{root}/classes cannot be read as nm .*: copy it again, or give"),
        (age, "the shards at {root} are of another version: write them anew"),
    ],
)
def test_shards_refuse_damage(shards: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(shards)
    with pytest.raises(InputError, match=message.format(root=shards)):
        open_images(shards)


def test_shards_refuse_an_empty_remote_root(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(InputError, match=r"local:.*/nowhere/classes cannot be read as nm shard"):
        open_images(f"local:{tmp_path}/nowhere")


def test_shards_name_the_missing_extra(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmlightning.datamodules.image_shards.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install litdata"):
        open_images(shards)


@pytest.mark.parametrize(("length", "shard_size"), [(1, 4), (7, 4), (200, 4), (1000, 10)])
def test_shuffle_rows_mixes_few_shards_at_a_time(length: int, shard_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = shuffle_rows(length, shard_size, generator)
    assert torch.equal(rows.sort().values, torch.arange(length))
    for few in rows.split(SHARDS_MIXED * shard_size):  # type: ignore[no-untyped-call]
        # The last shard is shorter, so that what follows it is shifted.
        assert len((few // shard_size).unique()) <= SHARDS_MIXED + 1
    if length > 100:
        assert (rows[1:] // shard_size == rows[:-1] // shard_size).double().mean() < 0.3
