"""Test checkpoints that are a folder with a file of each rank, and what they may name."""

import json
import os
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch
from torch.optim import SGD

from nmlightning import named_code
from nmlightning.commands.checkpoint import Checkpoint, checkpoint_hparams
from nmlightning.commands.files import RunPaths, is_whole, last_checkpoint
from nmlightning.errors import InputError
from nmlightning.models import CifarResNet
from nmlightning.surgery.checkpoints import load_from_checkpoint
from nmlightning.tasks import ImageClassifier


def write(runs: Path, version: int, seconds: int, *, sharded: bool) -> Path:
    """Write a checkpoint as of that many seconds, in a folder that is older."""
    path = runs / f"version_{version}" / "checkpoints" / "last.ckpt"
    file = path / "meta.pt" if sharded else path
    file.parent.mkdir(parents=True)
    torch.save({"step": torch.arange(100)}, file)
    (file.parent / ".metadata").touch()
    for each, when in ((path, 0), (file.parent / ".metadata", 0), (file, seconds)):
        os.utime(each, (when, when))
    return path


def damage(checkpoint: Path) -> None:
    """Flip a bit of the tensor's content; the time stays."""
    when = checkpoint.stat().st_mtime
    content = bytearray(checkpoint.read_bytes())
    content[content.index(b"\x07\0\0\0\0\0\0\0")] ^= 16
    checkpoint.write_bytes(content)
    os.utime(checkpoint, (when, when))


def test_last_checkpoint_is_the_newest_whole_one(tmp_path: Path) -> None:
    oldest = write(tmp_path, 0, 1, sharded=False)
    newest = write(tmp_path, 1, 4, sharded=True)
    between = write(tmp_path, 2, 3, sharded=True)
    step = write(tmp_path, 3, 2, sharded=False).rename(oldest.with_name("step=5.ckpt"))
    assert last_checkpoint(tmp_path) == (newest, [])
    (newest / ".metadata").unlink()
    damage(between / "meta.pt")
    assert last_checkpoint(tmp_path) == (oldest, [newest, between])
    damage(oldest)
    assert last_checkpoint(tmp_path) == (step, [newest, between])
    damage(step)
    (step.parent / ".last.ckpt.0.unfinished").touch()
    assert last_checkpoint(tmp_path)[0] is None


def test_checkpoint_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 0, 1, sharded=False)
    damage(path)
    with pytest.raises(InputError, match="is not a checkpoint, or is truncated"):
        checkpoint_hparams(str(path))
    content = bytearray(write(tmp_path, 1, 2, sharded=False).read_bytes())
    content[-30] ^= 8  # in the directory of the zip file, which has no checksum
    path.write_bytes(content)
    assert is_whole(path)
    assert last_checkpoint(tmp_path) == (tmp_path / "version_1/checkpoints/last.ckpt", [path])


@pytest.mark.parametrize("named", ["evil.Net", ".evil.Net", "antigravity.fly", 3])
def test_network_of_a_checkpoint_is_not_imported_to_compare_it(
    named: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text("raise AssertionError")
    monkeypatch.syspath_prepend(tmp_path)
    module = ImageClassifier(CifarResNet(8), lambda parameters: SGD(parameters, lr=0.1))
    module.hparams["net"] = {"class_path": f"{CifarResNet.__module__}.CifarResNet"}
    module.on_load_checkpoint(
        {"hyper_parameters": {"net": {"class_path": "nmlightning.models.CifarResNet"}}}
    )
    with pytest.raises(InputError, match=r"net\.class_path: checkpoint"):
        module.on_load_checkpoint({"hyper_parameters": {"net": {"class_path": named}}})
    assert "antigravity" not in sys.modules


def test_checkpoint_hparams_of_a_folder(tmp_path: Path) -> None:
    assert checkpoint_hparams(str(tmp_path)) == []
    stored = {"_class_path": "ImageClassifier", "label_smoothing": 0.25}
    torch.save({"hyper_parameters": stored}, tmp_path / "meta.pt")
    option, config = checkpoint_hparams(str(tmp_path))
    model = {"class_path": "ImageClassifier", "init_args": {"label_smoothing": 0.25}}
    assert (option, json.loads(config)) == ("--config", {"model": model})


@pytest.mark.parametrize("content", [[1], "x", torch.zeros(3)])
def test_checkpoint_hparams_of_something_else(content: object, tmp_path: Path) -> None:
    torch.save(content, path := tmp_path / "x.ckpt")
    with pytest.raises(InputError, match=r"x.ckpt' is not a checkpoint of Lightning\.$"):
        checkpoint_hparams(str(path))


def test_checkpoint_may_name_what_is_installed_or_typed(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    arguments = {"net": {"class_path": "torch.nn.Linear", "init_args": {}}, "label": "version.txt"}
    arguments |= {"_class_path": "nmlightning.tasks.ImageClassifier"}
    arguments |= {"_instantiator": "pytorch_lightning.cli.instantiate_module"}
    torch.save({"state_dict": {"x": torch.ones(1)}, "hyper_parameters": arguments}, path)
    assert checkpoint_hparams(str(path))
    arguments["net"] = {"class_path": "os.system"}
    torch.save({"state_dict": {"x": torch.ones(1)}, "hyper_parameters": arguments}, path)
    assert checkpoint_hparams(str(path), {"os.system"})


CLASS_PATHS = [
    *("last.ckpt", "évil.Net", "google.évil.Net", "google.évil", "evil.Net ", ".evil.Net"),
    *("evil:Net", " {class_path: évil.Net}", "evil-2.Net", "net.yaml"),
    *("a.yaml", "os.system", "antigravity.fly", "claimed.Net", "inner/net.yaml", "~/net.yaml"),
]


@pytest.mark.parametrize("named", CLASS_PATHS)
@pytest.mark.parametrize("place", ["_class_path", "net", "class_path", "_instantiator"])
def test_no_class_path_makes_a_file_of_the_current_folder_run(
    named: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "net" and named in (".evil.Net", "evil:Net", "evil-2.Net"):
        pytest.skip("a text that nobody takes for a class path")
    monkeypatch.setattr(sys, "path", [*sys.path, ""])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("google", "inner"):
        Path(folder).mkdir()
    Path("inner/net.yaml").write_text("{class_path: torch.nn.Linear, init_args: {a: c.yaml}}")
    Path("inner/c.yaml").write_text("class_path: evil.Net")
    Path("net.yaml").write_text("class_path: evil.Net")
    Path("a.yaml").write_text("[b.yaml]")
    Path("b.yaml").write_text("[a.yaml, {class_path: evil.Net}]")
    Path("claimed-1.dist-info").mkdir()
    Path("claimed-1.dist-info/top_level.txt").write_text("claimed")
    Path("claimed-1.dist-info/METADATA").write_text("Name: claimed")
    if named == "claimed.Net":  # what is cached for the others saw no such folder
        monkeypatch.setattr(named_code, "_packages", cache(packages_distributions))
    for file in ("last", "évil", "evil", "evil-2", "google/évil", "claimed"):
        Path(f"{file}.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    stored = {"_class_path": "nmlightning.tasks.ImageClassifier", "_instantiator": "a.b"}
    stored |= {"net": {"class_path": named}} if place == "class_path" else {place: named}
    torch.save({"state_dict": {"x": torch.ones(1)}, "hyper_parameters": stored}, "last.ckpt")
    paths = RunPaths(["test", "--config", "quickstart", "--ckpt_path", "last.ckpt"])
    for refused in (
        lambda: load_from_checkpoint(ImageClassifier, "last.ckpt"),
        lambda: checkpoint_hparams("last.ckpt", paths.typed),
        lambda: Checkpoint(Path("last.ckpt"), None),
    )[: 1 if place == "_instantiator" else 3]:  # which a command replaces by its own
        with pytest.raises(InputError, match=r"of no installed package|is not a class path"):
            refused()
    assert not Path("marker").exists()


@pytest.mark.parametrize(
    "words",
    [["--model", "my.Net"], ["--model.net=my.Net"], ["--model", "{net: {class_path: my.Net}}"]],
)
def test_class_paths_of_the_user_are_those_of_model_and_data(words: list[str]) -> None:
    config = ["--config", "{data: {class_path: my.Data}, seed_everything: other.thing}"]
    assert RunPaths(["fit", *words, *config]).typed == {"my.Net", "my.Data"}
