"""Find a config: a file on disk wins, else the one of that name that ships with the package."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from nmlightning.errors import InputError, nearest


def find_config(name: str) -> Path:
    """Return the file that `--config name` means.

    A file on disk wins. Else `configs/cifar_l1.yaml`, `cifar_l1.yaml` and `cifar_l1` all name the
    shipped config, from any folder.

    Raises:
        InputError: there is neither; the message lists the shipped configs.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = shipped_configs()
    if path.parent in (Path(), Path("configs")) and path.stem in shipped:
        return shipped[path.stem]
    where = f"there is no file {name!r} in {Path.cwd()}"
    hint = nearest(path.stem, shipped)
    raise InputError(f"--config: {where}; the shipped configs are {', '.join(shipped)}.{hint}")


def shipped_configs() -> dict[str, Path]:
    """Return the shipped configs by name; quickstart first, the others in alphabetical order."""
    found = {path.stem: path for path in sorted(_folder().glob("*.yaml"))}
    return dict(sorted(found.items(), key=lambda item: item[0] != "quickstart"))


def read_config(name: str) -> dict[str, Any]:
    """Return the content of the config that `--config name` means.

    Raises:
        InputError: there is no such config, or it is no YAML.
    """
    try:
        text = name if is_config_text(name) else find_config(name).read_text("utf-8")
        content = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"--config: {name!r} is no YAML: {error.problem}{line}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config: {name!r} is no YAML text: {error}.") from None
    except OSError as error:
        raise InputError(f"--config: {name!r} cannot be read: {error.strerror}.") from None
    if not isinstance(content, dict):
        raise InputError(f"--config: {name!r} holds no options, but {content!r}.")
    return content


def is_config_text(value: str) -> bool:
    """Whether `value` is YAML or JSON itself, which `--config` takes too, rather than a name."""
    return "\n" in value or "{" in value


def _folder() -> Path:
    package = Path(str(files("nmlightning")))
    installed = package / "configs"
    # setup.cfg ships the repository's configs/ as nmlightning/configs; a checkout has the former.
    return installed if installed.is_dir() else package.parent / "configs"
