"""Class paths that a file names: to import a module runs it, so only installed ones may be."""

import json
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import distribution, packages_distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from nmlightning.errors import InputError
from nmlightning.yaml_text import load_yaml

_CLASS_KEYS = ("class_path", "_class_path", "_instantiator")


def check_named_code(settings: Any, file: str, typed: Collection[str] = ()) -> None:
    """Raise InputError if settings from a file name what could be imported, and was not installed.

    A class may be of an installed package, of a module that is imported already, but for Python's
    own, or be among the class paths that the user has `typed`.
    """
    for key, text in _texts(settings):
        is_path = _is_path(text)
        if key in _CLASS_KEYS and not is_path:
            raise InputError(f"{file} has the {key} {text!r}, which is not a class path.")
        if is_path and "." in text and text not in typed and runs_what_is_not_installed(text):
            raise InputError(
                f"{file} names {text}, of no installed package, and to import that runs it: if you "
                "trust it, name it yourself, by --config or --model, or import it before."
            )


def typed_classes(*given: Any) -> set[str]:
    """Return the class paths in what the user gives to the model and the data, but not files."""
    texts = {text for each in given for _, text in _texts(each)}
    return {text for text in texts if _is_path(text) and not Path(text).exists()}


def _is_path(text: str) -> bool:
    """Return what jsonargparse says of a path; of one without a dot it looks up the name."""
    return all(part.isidentifier() for part in text.split("."))


def _texts(settings: Any, key: str = "", read: tuple[Path, ...] = ()) -> Iterator[tuple[str, str]]:
    """Yield each text with its key, and those within a text that is YAML, as a parser may do.

    One that names a file, beside the last of those `read` or in the current folder, is a config.
    """
    if isinstance(settings, Mapping):
        for name, value in settings.items():
            yield from _texts(value, str(name), read)
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from _texts(value, key, read)
    elif isinstance(settings, str):
        yield key, settings
        texts = [(settings, read)]
        for folder in (Path(), *(file.parent for file in read[-1:])):
            with suppress(OSError, RuntimeError, ValueError):  # such as a home that nobody has
                file = (folder / Path(settings).expanduser()).resolve()
                if file.is_file() and file not in read:
                    texts.append((file.read_text("utf-8"), (*read, file)))
        for text, files in texts:
            try:
                inner = load_yaml(text, key)
            except (InputError, ValueError):
                continue
            if inner != settings and isinstance(inner, str | dict | list):
                yield from _texts(inner, "", files)


def runs_what_is_not_installed(path: str) -> bool:
    """Return whether to import a class path would run a module that is Python's or nobody's.

    What contains it is imported on the way, once it is known to be installed.
    """
    top, name, own = path.partition(".")[0], "", list[Path]()
    for part in path.split("."):
        name = f"{name}.{part}".lstrip(".")
        module = None if top in sys.stdlib_module_names else sys.modules.get(name)
        origin = getattr(module, "__file__", None)
        if module is None:
            try:
                spec = find_spec(name)
            except ModuleNotFoundError:  # inside of what is no package
                return False
            except Exception:  # such as __main__, or a package that fails
                return True
            if spec is None:  # a class, or nothing
                return False
            origin = spec.origin
            folders = (*own, *_folders_of(top))
            if origin and not any(x in Path(origin).resolve().parents for x in folders):
                return True
        own = [Path(origin).resolve().parent] if origin else []  # a namespace has several
    return False


_packages = cache(packages_distributions)


def _folders_of(package: str) -> Iterator[Path]:
    """Yield where the distributions of a package lie, which the current folder is not."""
    for name in _packages().get(package, ()):
        found = distribution(name)
        folder = Path(str(found.locate_file(""))).resolve()
        if folder == Path.cwd():
            continue
        yield folder
        url = json.loads(found.read_text("direct_url.json") or "{}")
        if url.get("dir_info", {}).get("editable"):
            yield Path(url2pathname(urlsplit(url["url"]).path)).resolve()
