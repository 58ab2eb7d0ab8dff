"""`nm shard`: what it writes and says, and what it refuses."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from nmlightning.cli import main
from nmlightning.commands.shard import run
from nmlightning.datamodules.image_shards import ShardedImages, ShardWriter, read_index
from nmlightning.errors import InputError

pytest.importorskip("litdata")


@pytest.fixture
def folder(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    return image_folder


def test_shard_prints_what_it_wrote(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    assert main(["shard", "images", "out", "--shard_size", "5"]) == 0
    out, err = capsys.readouterr()
    assert [line.split() for line in out.splitlines()] == [
        ["train", "12", "images", "in", "3", "shards"],
        ["val", "6", "images", "in", "2", "shards"],
        ["shards", "out:", "give", "it", "to", "ImageNet", "as", "--data.root"],
    ]
    assert re.search(r"train .*12/12", err), "progress"
    assert sorted(path.name for path in Path("out").iterdir()) == ["classes", "train", "val"]
    assert not list(Path().glob("*.unfinished"))


@pytest.mark.filterwarnings("default:Skipped")
def test_shard_leaves_out_damaged_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "train/b/2.JPEG").write_bytes(b"")
    (folder / "val/c/1.JPEG").write_bytes(b"no image")
    (folder / "val/c/notes.txt").touch()
    assert main(["shard", str(folder), "out", "--damaged", "skip"]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"nm: .*/val holds files .*, 1 in all: c/notes.txt\n", err)
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["train", "11"], ["val", "5"]]
    assert lines[2:5] == [
        " skipped     damaged images, 2 in all:",
        f"             {folder}/train/b/2.JPEG (of no known format)",
        f"             {folder}/val/c/1.JPEG (of no known format)",
    ]


def empty_train(folder: Path) -> None:
    for path in (folder / "train").glob("*/*"):
        path.write_bytes(b"")


def hold_something(folder: Path) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").touch()


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (lambda folder: (folder / "train/a/0.JPEG").write_bytes(b""), [], "train/a/0.JPEG cannot"),
        (lambda folder: (folder / "val/a/Thumbs.db").touch(), [], "holds files .*, 1 in all:"),
        (lambda folder: (folder / "val/c").rename("c"), [], "3 classes and .*val 2, .* differ in"),
        (empty_train, ["--damaged", "skip"], "none of the 12 images in .*/train can be read"),
        (hold_something, [], "out holds something already: name a folder that does not exist yet"),
        (lambda folder: Path("out").touch(), [], "out holds something already"),
        (lambda folder: None, ["--shard_size", "0"], "--shard_size must be a whole number of at"),
        (lambda folder: None, ["--damaged", "ignore"], "argument --damaged: invalid choice"),
    ],
)
def test_shard_reports_bad_input_in_one_line(
    folder: Path, damage: Callable[[Path], object], options: list[str], message: str
) -> None:
    damage(folder)
    before = sorted(Path().iterdir())
    with pytest.raises(InputError, match=message):
        run([str(folder), "out", *options])
    assert sorted(Path().iterdir()) == before, "nothing is left of what was not finished"


def test_shard_beside_another_leaves_one_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(".out.0.unfinished").mkdir()  # of a process that was killed
    write_index = ShardWriter.write_index

    def be_second(self: ShardWriter, classes: Sequence[str]) -> None:
        monkeypatch.setattr(ShardWriter, "write_index", write_index)
        assert run([str(folder), "out"]) == 0
        write_index(self, classes)

    monkeypatch.setattr(ShardWriter, "write_index", be_second)
    with pytest.raises(InputError, match="out holds something already"):
        run([str(folder), "out"])
    assert ShardedImages("out", "val", read_index("out")).length
    assert not list(Path().glob("*.unfinished"))


@pytest.mark.parametrize("out", ["images/train/d", "images/val/a", "images/val", "link/new/er"])
def test_shard_refuses_a_target_among_the_images(folder: Path, out: str) -> None:
    Path("link").symlink_to(folder / "train")
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match=f"{out} is inside images/(train|val), where it would be"):
        run(["images", out])
    assert sorted(folder.rglob("*")) == before
    assert run(["images", "images/shards"]) == 0


def test_shard_escapes_names_beyond_utf_8(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        folder = folder.rename(os.fsdecode(b"images\xfe"))
    except OSError:
        pytest.skip("this file system has names in UTF-8 alone")
    named = folder / "val" / "a" / os.fsdecode(b"bad\xff.png")
    (folder / "val/a/0.JPEG").rename(named)
    assert main(["shard", str(folder), "out"]) == 0
    images = ShardedImages("out", "val", read_index("out"))
    names = [images.fetch(row).name for row in range(images.length)]
    assert r"out/val/a/bad\udcff.png" in names
    named.write_bytes(b"")
    assert main(["shard", str(folder), "skipped", "--damaged", "skip"]) == 0
    assert r"images\udcfe/val/a/bad\udcff.png (of no known" in capsys.readouterr().out


def test_shard_interrupted_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nmlightning.datamodules.decoded_images.decode", interrupt)
    assert main(["shard", str(folder), "out"]) == 130
    assert sorted(Path().iterdir()) == [Path("images")]
