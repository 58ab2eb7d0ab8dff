"""The options of the model that a checkpoint remembers, below those that are given."""

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nmlightning.errors import InputError

_OF_ALL_RANKS = "meta.pt"  # in a checkpoint that is a folder with a file of each rank


def remembered_options(checkpoint: str | None) -> list[str]:
    """Return the model's options in `checkpoint` as one more `--config`, to be placed first.

    Whatever comes after it on the command line, in configs or as options, wins.

    Raises:
        InputError: the file cannot be read.
    """
    if not checkpoint or "://" in checkpoint:
        return []
    path = Path(checkpoint)
    if path.is_dir():
        path /= _OF_ALL_RANKS
        if not path.exists():
            return []
    model = model_in(_read_hyper_parameters(path))
    if model is None:
        return []  # not trained by a command line: nothing that it could parse
    return ["--config", json.dumps({"model": model})]


def model_in(hyper_parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the model's class and arguments, if a command line has made it."""
    arguments = dict(hyper_parameters)
    class_path = arguments.pop("_class_path", None)
    arguments.pop("_instantiator", None)
    return None if class_path is None else {"class_path": class_path, "init_args": arguments}


def _read_hyper_parameters(path: Path) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):
        raise InputError(f"--ckpt_path: {str(path)!r} is no checkpoint, or a truncated one.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        return {}  # objects of the user's own, which the Trainer judges when it loads them
    return dict(checkpoint.get("hyper_parameters", {}))
