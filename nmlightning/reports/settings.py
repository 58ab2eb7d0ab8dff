"""The settings of a run on one level, so that a person can compare them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from nmlightning.errors import InputError


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads what any project's hyper-parameters hold; of an object it takes the type's name."""


_Loader.add_multi_constructor("", lambda loader, suffix, node: suffix)

# Who ran it where, not what was run.
_NO_SETTINGS = (
    *("seed_everything", "ckpt_path", "weights_only", "data.root", "trainer.logger"),
    *("trainer.default_root_dir", "trainer.enable_progress_bar", "trainer.enable_model_summary"),
)
# A reference of another seed belongs to the same setting.
_NO_SETTINGS_ANYWHERE = ("reference", "_instantiator")


def read_saved_config(folder: Path) -> dict[str, Any]:
    """Return what `config.yaml`, or else `hparams.yaml`, in a run's folder says; {} without them.

    Raises:
        InputError: the file is no YAML.
    """
    file = next((f for f in (folder / "config.yaml", folder / "hparams.yaml") if f.is_file()), None)
    if file is None:
        return {}
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is no YAML: {error}.") from error
    return content if isinstance(content, dict) else {}


def flatten_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a config, without what has no influence on the result.

    Nothing of value None is a setting. The name of a class stands for its path, and as the key of
    what is in a list:

    >>> flatten_settings({"net": {"class_path": "a.Net", "init_args": {"depth": 3}}})
    {'net': 'Net', 'net.depth': 3}
    >>> flatten_settings({"callbacks": [{"class_path": "a.Swap", "init_args": {"norm": "l1"}}]})
    {'callbacks.Swap': 'yes', 'callbacks.Swap.norm': 'l1'}
    """
    return {
        key: value
        for key, value in _flatten(config, "")
        if value is not None
        and not any(key == name or key.startswith(f"{name}.") for name in _NO_SETTINGS)
        and key.rpartition(".")[2] not in _NO_SETTINGS_ANYWHERE
    }


def _flatten(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if _is_class(value):
        yield key, _class_name(value)
        yield from _flatten(value.get("init_args") or {}, key)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flatten(inner, _join(key, str(name)))
    elif isinstance(value, list) and value and all(map(_is_class, value)):
        for inner in value:
            yield _join(key, _class_name(inner)), "yes"
            yield from _flatten(inner.get("init_args") or {}, _join(key, _class_name(inner)))
    else:
        yield key, str(value) if isinstance(value, list) else value


def _is_class(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("class_path"), str)


def _class_name(value: Mapping[str, Any]) -> str:
    return str(value["class_path"]).rpartition(".")[2]


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
