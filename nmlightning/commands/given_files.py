"""The configs and the checkpoint on a command line, known before it is parsed.

Parsing needs both: the name of the run is a default, and so is what the checkpoint remembers. And
a misspelt file is reported at once, without waiting for torch.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nmlightning.commands.config_files import is_config_text, read_config
from nmlightning.commands.run_folder import RUNS, folder_of_runs, last_checkpoint
from nmlightning.errors import InputError

# Lightning's keywords for --ckpt_path.
LAST = "last"
OTHER_KEYWORDS = ("best", "hpc")
_PLACE_OF_RUNS = re.compile(r"--trainer\.logger\.(init_args\.)?(save_dir|name|root_dir)\b")


class GivenFiles:
    """What `--config` and `--ckpt_path` name.

    `--ckpt_path last` is the newest last checkpoint of this experiment's runs. Where there is none
    a fit starts anew, so that the command which begins a training also goes on with it.

    Args:
        arguments: the command and its options.

    Raises:
        InputError: a file that is named does not exist, or a config is no YAML.
    """

    def __init__(self, arguments: list[str]) -> None:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("-c", "--config", action="append", nargs="?", default=[])
        parser.add_argument("--ckpt_path", nargs="?")
        given, _ = parser.parse_known_args(arguments)
        names = [name for name in given.config if name]
        files = [Path(name) for name in names if not is_config_text(name)]
        configs = [read_config(name) for name in names]
        in_configs = [config.get("ckpt_path") for config in configs]
        self.run_name = files[0].stem if files else "run"
        self.runs = folder_of_runs(files[0] if files else None, self.run_name)
        checkpoint = next(filter(None, [given.ckpt_path, *reversed(in_configs)]), None)
        self.wants_last = checkpoint == LAST
        if self.wants_last:
            self._check_place(arguments, configs)
            self.checkpoint = self._last_checkpoint(needed=arguments[0] != "fit")
        else:
            self.checkpoint = _existing(checkpoint)

    def _check_place(self, arguments: list[str], configs: Sequence[Mapping[str, Any]]) -> None:
        """Raise InputError if a logger keeps the runs elsewhere than they are looked for."""
        given = next(filter(_PLACE_OF_RUNS.match, arguments), None)
        places = [place for config in configs for place in _logger_folders(config)]
        is_of_a_run = self.runs != RUNS / self.run_name  # where a config lies that a run has saved
        elsewhere = [] if is_of_a_run else [place for place in places if place != self.runs]
        if given or elsewhere:
            keeper = given or f"trainer.logger, in {elsewhere[0]},"
            raise InputError(
                f"--ckpt_path: {LAST!r} looks in {self.runs}, but {keeper} keeps this run "
                "elsewhere: give the path of a checkpoint."
            )

    def _last_checkpoint(self, needed: bool) -> str | None:
        found = last_checkpoint(self.runs)
        if needed and not found:
            raise InputError(
                f"--ckpt_path: {self.runs} has no checkpoint yet; give the path of one."
            )
        return str(found) if found else None


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
    if checkpoint and "://" not in checkpoint and not Path(checkpoint).exists():
        raise InputError(f"--ckpt_path: there is no file {checkpoint!r} in {Path.cwd()}.")
    return checkpoint
