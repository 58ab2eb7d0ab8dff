"""The configs and the checkpoint on a command line, known before it is parsed.

Parsing needs both: the name of the run is a default, and so is what the checkpoint remembers. And
a misspelt file is reported at once, without waiting for torch.
"""

import argparse
from pathlib import Path

from nmlightning.commands.config_files import is_config_text, read_config
from nmlightning.commands.run_folder import folder_of_runs, last_checkpoint
from nmlightning.errors import InputError

# Lightning's keywords for --ckpt_path.
LAST = "last"
OTHER_KEYWORDS = ("best", "hpc")


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
        in_configs = [read_config(name).get("ckpt_path") for name in names]
        self.run_name = files[0].stem if files else "run"
        self.runs = folder_of_runs(files[0] if files else None, self.run_name)
        checkpoint = next(filter(None, [given.ckpt_path, *reversed(in_configs)]), None)
        self.wants_last = checkpoint == LAST
        if self.wants_last:
            self.checkpoint = self._last_checkpoint(needed=arguments[0] != "fit")
        else:
            self.checkpoint = _existing(checkpoint)

    def _last_checkpoint(self, needed: bool) -> str | None:
        found = last_checkpoint(self.runs)
        if needed and not found:
            raise InputError(
                f"--ckpt_path: {self.runs} has no checkpoint yet; give the path of one."
            )
        return str(found) if found else None


def _existing(checkpoint: str | None) -> str | None:
    if checkpoint in OTHER_KEYWORDS:
        raise InputError(
            f"--ckpt_path: {checkpoint!r} means something only to the Trainer that wrote it; give "
            f"the path of a checkpoint, or {LAST!r} for the newest of earlier runs."
        )
    if checkpoint and "://" not in checkpoint and not Path(checkpoint).exists():
        raise InputError(f"--ckpt_path: there is no file {checkpoint!r} in {Path.cwd()}.")
    return checkpoint
