"""Test checkpoints that are a folder with a file of each rank."""

import json
import os
from pathlib import Path

import torch

from nmlightning.commands.checkpoint import checkpoint_hparams
from nmlightning.commands.files import last_checkpoint


def write(runs: Path, version: int, seconds: int, *, sharded: bool) -> Path:
    """Write a checkpoint as of that many seconds, in a folder that is older."""
    path = runs / f"version_{version}" / "checkpoints" / "last.ckpt"
    file = path / "__0_0.distcp" if sharded else path
    file.parent.mkdir(parents=True)
    file.touch()
    for each, when in ((path, 0), (file, seconds)):
        os.utime(each, (when, when))
    return path


def test_last_checkpoint_has_the_newest_file(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, sharded=False)
    newest = write(tmp_path, 1, 3, sharded=True)
    write(tmp_path, 2, 2, sharded=True)
    assert last_checkpoint(tmp_path) == newest


def test_checkpoint_hparams_of_a_folder(tmp_path: Path) -> None:
    stored = {"_class_path": "ImageClassifier", "label_smoothing": 0.25}
    torch.save({"hyper_parameters": stored}, tmp_path / "meta.pt")
    option, config = checkpoint_hparams(str(tmp_path))
    model = {"class_path": "ImageClassifier", "init_args": {"label_smoothing": 0.25}}
    assert (option, json.loads(config)) == ("--config", {"model": model})


def test_checkpoint_hparams_of_another_folder(tmp_path: Path) -> None:
    assert checkpoint_hparams(str(tmp_path)) == []
