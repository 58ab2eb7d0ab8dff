"""The configs and the checkpoint on a command line, known before it is parsed.

Parsing needs both: the name of the run is a default, and so is what the checkpoint remembers. And
a misspelt file is reported at once, without waiting for torch.
"""

import argparse
from pathlib import Path

from nmlightning.commands.config_files import is_config_text, read_config
from nmlightning.errors import InputError


class GivenFiles:
    """What `--config` and `--ckpt_path` name.

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
        self.checkpoint = _existing(
            next(filter(None, [given.ckpt_path, *reversed(in_configs)]), None)
        )


def _existing(checkpoint: str | None) -> str | None:
    if checkpoint and "://" not in checkpoint and not Path(checkpoint).exists():
        raise InputError(f"--ckpt_path: there is no file {checkpoint!r} in {Path.cwd()}.")
    return checkpoint
