"""Paths of configs, run folders and checkpoints, and the files that a command writes.

Nothing here needs torch: a misspelt path is reported at once.
"""

import argparse
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from nmlightning.atomic_file import UnwritableError, is_whole_zip, next_version, replace_file
from nmlightning.errors import InputError, cut
from nmlightning.name_patterns import some
from nmlightning.named_code import typed_classes
from nmlightning.yaml_text import load_yaml

# What the shipped configs are, by the beginning of their names.
CONFIG_GROUPS = {
    "quickstart": "ResNet-20 by L1 on the digits: the first run",
    "quickstart_int8": "the same in 8 bits",
    "translate_quickstart": "Transformer on number names, German to English",
    "cifar_": "ResNet-56 on CIFAR-10",
    "imagenet_resnet18_": "ResNet-18, ImageNet",
    "imagenet_resnet50_": "ResNet-50, ImageNet",
    "multi30k_transformer_": "small Transformer on Multi30k",
    "wmt14_transformer_": "base Transformer on WMT14",
    "wmt14_lstm_": "LSTM with attention on WMT14",
    "study_int8_": "8 bits, ResNet-20 on CIFAR-10 in ten epochs",
    "study_short_": "weight decay, in minutes",
    "study_": "weight decay, the paper's schedule",
}


def find_config(name: str) -> Path:
    """Return the file that `--config name` means, or list the shipped configs in an InputError.

    A file on disk wins. Else `configs/cifar_l1.yaml`, `cifar_l1.yaml` and `cifar_l1` all name the
    shipped config, from any folder.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = shipped_configs()
    if path.parent in (Path(), Path("configs")) and path.stem in shipped:
        return shipped[path.stem]
    if path.exists():
        raise InputError(f"--config: {name!r} is not a regular file, which a config must be.")
    lists = f"Files are looked for in {Path.cwd()}; nm --help lists the shipped configs."
    raise InputError(f"--config: no config {cut(name)}.{_nearest_configs(path.stem)} {lists}")


def _nearest_configs(name: str) -> str:
    """Return `" Did you mean …?"` of one, or else of all whose name or title has it; or `""`."""
    letters = partial(re.sub, r"[\W_]", "")
    word, names = letters(name.lower()), {letters(config): config for config in shipped_configs()}
    if not (near := get_close_matches(word, names, n=1, cutoff=0.9)):
        titles = {x: letters(CONFIG_GROUPS[config_group(names[x])].lower()) for x in names}
        near = [key for key in names if word in key] or [x for x in names if word in titles[x]]
        if len(near) > 1:
            return f" Did you mean one of {some((names[key] for key in near), 16)}?"
        near = near or get_close_matches(word, names, n=1, cutoff=0.5)
    return f" Did you mean {names[near[0]]!r}?" if near else ""


def config_group(name: str) -> str:
    """Return the key of CONFIG_GROUPS that a shipped config belongs to."""
    return max(filter(name.startswith, CONFIG_GROUPS), key=len)


def shipped_configs() -> dict[str, Path]:
    """Return the shipped configs by name; quickstart first, the others in alphabetical order."""
    package = Path(str(files("nmlightning")))
    installed = package / "configs"
    # setup.cfg ships the repository's configs/ as nmlightning/configs; a checkout has the former.
    folder = installed if installed.is_dir() else package.parent / "configs"
    found = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return dict(sorted(found.items(), key=lambda item: item[0] != "quickstart"))


def read_config(name: str) -> dict[str, Any]:
    """Return the content of the config that `--config name` means."""
    try:
        text = name if is_config_text(name) else find_config(name).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"--config: {name!r} is not YAML text: {error}.") from None
    except OSError as error:
        raise InputError(f"--config: {name!r} cannot be read: {error.strerror}.") from None
    content = load_yaml(text, f"--config: {name!r}")
    if not isinstance(content, dict):
        held = "is empty" if content is None else f"holds no options, but {cut(content)}"
        shadows = not is_config_text(name) and Path(name).stem in shipped_configs()
        way_out = "; it stands before the shipped config of that name: rename it" if shadows else ""
        raise InputError(f"--config: {name!r} {held}{way_out}.")
    return content


def is_config_text(value: str) -> bool:
    """Return True for YAML or JSON itself, which `--config` takes too, rather than a name."""
    return "\n" in value or "{" in value


RUNS = Path("runs")
CHECKPOINTS = "checkpoints"  # Lightning's name
SHARED_FILE = "meta.pt"  # in a checkpoint that is a folder with a file of each rank
LAST = "last"  # of Lightning's keywords for --ckpt_path


def last_checkpoint(runs: Path) -> tuple[Path | None, list[Path]]:
    """Return the newest whole checkpoint in `runs`, and the damaged ones that are newer.

    Of a run that has a whole one that is called last, as Lightning's keyword has it, the others do
    not count. Lightning looks in the folder of the new run, which with `nm` is always a new one.
    """
    found = [path for path in runs.glob(f"version_*/{CHECKPOINTS}/[!.]*.ckpt") if path.exists()]
    whole = cache(_opens)
    damaged: list[Path] = []
    for path in sorted(found, key=time_written, reverse=True):
        lasts = [other for other in found if LAST in other.name and other.parent == path.parent]
        if path not in lasts and any(map(whole, lasts)):
            continue
        if whole(path):
            return path, damaged
        damaged.append(path)
    return None, damaged


def is_whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint's checksums are right; of a folder those of its shared file."""
    if checkpoint.is_dir():
        return (checkpoint / ".metadata").is_file() and is_whole(checkpoint / SHARED_FILE)
    return is_whole_zip(checkpoint)


def _opens(checkpoint: Path) -> bool:
    """Return whether a checkpoint is whole, also to torch, which reads the directory, too."""
    import torch

    if not is_whole(checkpoint):
        return False
    file = checkpoint / SHARED_FILE if checkpoint.is_dir() else checkpoint
    try:
        return isinstance(torch.load(file, "cpu", weights_only=True, mmap=True), dict)
    except RuntimeError:
        return False
    except UnpicklingError:  # objects of the user's own
        return True


def time_written(checkpoint: Path) -> float:
    """Return when a checkpoint was last written, which may be a folder with a file of each rank."""
    return max(path.stat().st_mtime for path in (checkpoint, *checkpoint.glob("*")))


def is_checkpoint(name: str) -> bool:
    """Return whether a word of the command line names a checkpoint, and no config."""
    return name.endswith(".ckpt") or zipfile.is_zipfile(name)


def config_of(checkpoint: Path) -> Path | None:
    """Return the config that the run of a checkpoint has saved, if it is where fit put both."""
    config = checkpoint.parent.parent / "config.yaml"
    return config if checkpoint.parent.name == CHECKPOINTS and config.is_file() else None


def default_logger(run_name: str) -> dict[str, Any]:
    """Return TensorBoard's logger as a config, which a later option may give another class."""
    # hp_metric would be a meaningless scalar of -1 in every run.
    arguments = {"save_dir": str(RUNS), "name": run_name, "default_hp_metric": False}
    return {"class_path": "pytorch_lightning.loggers.TensorBoardLogger", "init_args": arguments}


def new_version(run_name: str) -> Path:
    """Return `runs/<run_name>/version_N` after all that exist, as the loggers count them."""
    return next_version(RUNS / run_name)


OTHER_KEYWORDS = ("best", "hpc")
_RUN_FOLDER_OPTION = re.compile(r"--trainer\.logger\.(init_args\.)?(save_dir|name|root_dir)\b")
_NAMES_CODE = re.compile(r"--(model|data)\b")


def remove_made(folders: list[Path]) -> None:
    """Delete a run's folder, and those above it that were made for it and hold no other run."""
    for folder in folders[:1]:
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        for folder in folders[1:]:
            folder.rmdir()


class RunPaths:
    """The paths that `--config` and `--ckpt_path` name; InputError for one that does not exist.

    `--ckpt_path last` is the newest whole checkpoint of this experiment's runs, and `damaged` what
    it passes over. Where there is none a fit starts anew, so that the command which begins a
    training also resumes it. `typed` are the class paths that the user gave, also in configs.
    """

    def __init__(self, arguments: list[str]) -> None:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("-c", "--config", action="append", nargs="?", default=[])
        parser.add_argument("--ckpt_path", nargs="?")
        given, _ = parser.parse_known_args(arguments)
        names = [name for name in given.config if name]
        files = [Path(name) for name in names if not is_config_text(name)]
        configs = [read_config(name) for name in names]
        words = zip(arguments, [*arguments[1:], ""], strict=True)
        values = [x.partition("=")[2] or after for x, after in words if _NAMES_CODE.match(x)]
        self.typed = typed_classes(values, *([x.get("model"), x.get("data")] for x in configs))
        in_configs = [config.get("ckpt_path") for config in configs]
        config = files[0] if files else Path("run")
        self.run_name = config.stem
        # A config may be one that a run has saved: the others are beside that run.
        is_of_a_run = config.name == "config.yaml" and (config.parent / CHECKPOINTS).is_dir()
        self.runs = config.parent.parent if is_of_a_run else RUNS / self.run_name
        checkpoint = next(filter(None, [given.ckpt_path, *reversed(in_configs)]), None)
        self.wants_last = checkpoint == LAST
        self.damaged: list[Path] = []
        if self.wants_last:
            self._check_run_folder(arguments, configs)
            found, self.damaged = last_checkpoint(self.runs)
            if found is None and arguments[0] != "fit":
                lack = "whole checkpoint" if self.damaged else "checkpoint yet"
                raise InputError(f"--ckpt_path: {self.runs} has no {lack}; give the path of one.")
            self.checkpoint = str(found) if found else None
        else:
            self.checkpoint = _existing(checkpoint)

    def _check_run_folder(self, arguments: list[str], configs: Sequence[Mapping[str, Any]]) -> None:
        """Raise InputError if a logger keeps the runs elsewhere than they are looked for."""
        given = next(filter(_RUN_FOLDER_OPTION.match, arguments), None)
        places = [place for config in configs for place in _logger_folders(config)]
        is_of_a_run = self.runs != RUNS / self.run_name  # where a config lies that a run has saved
        elsewhere = [] if is_of_a_run else [place for place in places if place != self.runs]
        if given or elsewhere:
            keeper = given or f"trainer.logger, in {elsewhere[0]},"
            raise InputError(
                f"--ckpt_path: {LAST!r} looks in {self.runs}, but {keeper} keeps this run "
                "elsewhere: give the path of a checkpoint."
            )


def _logger_folders(config: Mapping[str, Any]) -> list[Path]:
    """Return where the loggers of a config keep runs, if it says so."""
    trainer = config.get("trainer")
    loggers = trainer.get("logger") if isinstance(trainer, dict) else None
    given = [
        logger.get("init_args", {})
        for logger in (loggers if isinstance(loggers, list) else [loggers])
        if isinstance(logger, dict)
    ]
    return [Path(x["save_dir"], x["name"]) for x in given if x.get("save_dir") and x.get("name")]


def _existing(checkpoint: str | None) -> str | None:
    if checkpoint in OTHER_KEYWORDS:
        raise InputError(
            f"--ckpt_path: {checkpoint!r} means something only to the Trainer that wrote it; give "
            f"the path of a checkpoint, or {LAST!r} for the newest of earlier runs."
        )
    scheme, _, rest = (checkpoint or "").partition("://")
    if rest and scheme != scheme.lower():
        raise InputError(f"--ckpt_path: write {scheme.lower()}:// for {scheme}://.")
    if checkpoint and "://" not in checkpoint:
        path = Path(checkpoint)
        if not path.exists():
            raise InputError(f"--ckpt_path: there is no file {checkpoint!r} in {Path.cwd()}.")
        parts = (".metadata", SHARED_FILE, "checkpoint")  # of a sharded one
        if not (path.is_file() or any((path / name).exists() for name in parts)):
            odd = "neither a file nor a folder"
            kind = "a folder without a sharded checkpoint" if path.is_dir() else odd
            raise InputError(f"--ckpt_path: {checkpoint!r} is {kind}.")
    return checkpoint


def check_replaceable(option: str, file: Path, mark: str, what: str) -> None:
    """Raise InputError if `file` is a folder or a device, or lacks the mark of what is written."""
    if file.is_dir():
        raise InputError(f"{option}: {file} is a folder; name a file in it.")
    if not file.parent.is_dir():
        raise InputError(f"{option}: there is no folder {str(file.parent)!r} for {file.name!r}.")
    if file.exists() and not file.is_file():
        raise InputError(f"{option}: {file} is not a regular file; give another name.")
    if file.exists() and mark not in file.read_text(encoding="utf-8", errors="replace"):
        raise InputError(f"{option}: {file} is no {what}; give another name.")


def write_file(option: str, file: Path, text: str) -> None:
    try:
        with replace_file(file) as opened:
            opened.write(text.encode(errors="backslashreplace"))  # a name may be no UTF-8
    except UnwritableError as error:
        raise InputError(f"{option}: {error}") from error
