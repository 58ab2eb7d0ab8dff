"""The argument parser of the training commands: shipped configs by name, errors as one line.

jsonargparse's message is a tree of attempts. Its first branch is what the user meant: the keys and
classes on the way to the first complaint say where, and the complaint says what.
"""

import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache, reduce
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

import torch
from jsonargparse import ActionConfigFile, DefaultHelpFormatter, Namespace, get_loader, set_loader
from pytorch_lightning import Callback, LightningDataModule, LightningModule
from pytorch_lightning.cli import LightningArgumentParser
from pytorch_lightning.loggers import Logger
from torch.optim.lr_scheduler import LRScheduler
from yaml import YAMLError

from nmlightning.commands.argument_parser import HELP_WIDTH
from nmlightning.commands.files import find_config, is_config_text, shipped_configs
from nmlightning.errors import InputError, cut, lay_out, nearest, terminal_width
from nmlightning.optim import StepRule
from nmlightning.yaml_text import check_yaml, describe_error

# By the last word of a key: the base of its classes, and our package that exports some.
KINDS: dict[str, tuple[type, str]] = {
    "model": (LightningModule, "nmlightning.tasks"),
    "data": (LightningDataModule, "nmlightning.datamodules"),
    "callbacks": (Callback, "nmlightning.callbacks"),
    "net": (torch.nn.Module, "nmlightning.models"),
    "steering": (StepRule, "nmlightning.optim"),
    "logger": (Logger, ""),
    "optimizer": (torch.optim.Optimizer, ""),
    "lr_scheduler": (LRScheduler, ""),
}
EXPLAINED = 'Parser key "config": '
GIVEN_BY_THE_TASK = ("params", "optimizer")  # as the first argument, of optimizer and scheduler


class Place(NamedTuple):
    """The place of a complaint: its key, the class there, the plain types tried before it."""

    key: str = ""
    class_path: str = ""
    types: tuple[str, ...] = ()

    def after(self, line: str) -> "Place":
        """Return the place that `line` of the account leads to."""
        keys = re.findall(r'Parser key "([^"]+)"', line)
        class_paths = re.findall(r"class_path[= ]'([^']+)'", line)
        plain = re.findall(r"- Expected an? (<class .+>)$", line)
        return Place(
            ".".join([self.key, *keys]).lstrip("."),
            class_paths[-1] if class_paths else self.class_path,
            (*self.types, *map(_type_name, plain)),
        )


def explain_parse_error(message: str, options: Iterable[str]) -> str:
    """Return one line for jsonargparse's `message`; `options` are the keys of the command."""
    if message.startswith(EXPLAINED):  # by the call for what is inside the config
        return message.removeprefix(EXPLAINED)
    place = Place()
    for line in message.splitlines():
        place = place.after(line)
        for pattern, explain in _COMPLAINTS.items():
            if place.key and (complaint := re.search(pattern, line)):
                return explain(place, *complaint.groups())
    first = reduce(Place.after, message.partition("Given value:")[0].splitlines(), Place())
    return _explain_option(message, list(options)) or _explain_value(first.key, message)


def _unknown_argument(place: Place, argument: str) -> str:
    module, _, name = place.class_path.rpartition(".")
    allowed = _arguments_of(getattr(import_module(module), name))
    if not allowed:  # The base class is all that is known so far.
        return (
            f"{place.key} has no option {argument!r} before its class is known; put --config, or "
            f"--{place.key} with a class, in front of it."
        )
    takes = f"{name} takes {', '.join(allowed)}"
    return f"{place.key} has no option {argument!r}; {takes}.{nearest(argument, allowed)}"


def _arguments_of(configured: Callable[..., Any]) -> list[str]:
    arguments = inspect.signature(configured).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [argument.name for argument in arguments if argument.kind in named]
    return names[1:] if names[:1] and names[0] in GIVEN_BY_THE_TASK else names


def _unknown_class(place: Place, name: str) -> str:
    if place.types and _last_word(place.key) not in KINDS:
        return f"{place.key}: expected {' or '.join(place.types)}, received {cut(name)}."
    return f"{place.key}: there is no class {cut(name)}{_classes_instead(place.key, name)}"


def _not_importable(place: Place, reason: str) -> str:
    path = ".".join(re.findall("'(.+?)'", reason))  # of an inner class where the place has none
    path = place.class_path if place.class_path.startswith(path) else path
    instead = _classes_instead(place.key, _last_word(path))
    return f"{place.key}: cannot import {path!r} ({reason}){instead}"


def _classes_instead(key: str, name: str) -> str:
    """Return which classes the key takes, and the one that a misspelt name is nearest to."""
    if (kind := _last_word(key)) not in KINDS:
        return "; give a class path."
    base, package = KINDS[kind]
    count = Counter(child.__name__ for child in _subclasses(base))
    known = {each.lower(): each for each in count if not each.startswith("_")}
    ours = {
        each.lower(): each if count[each] == 1 else f"{package}.{each}"
        for each in exported_classes(base, package)
    }
    known |= ours
    offered = ", ".join(ours.values() or sorted(known.values()))
    close = nearest(name.lower(), known)
    hint = re.sub(r"'(\w+)'", lambda found: repr(known[found[1]]), close)
    return f"; give {offered} or a class path.{hint}"


@cache
def exported_classes(base: type, package: str) -> list[str]:
    """Import our package, and return the names of its classes of a base that take arguments."""
    if not package:
        return []
    module = import_module(package)
    exported = [getattr(module, name) for name in dir(module)]
    classes = [each for each in exported if isinstance(each, type) and issubclass(each, base)]
    return [x.__name__ for x in classes if not inspect.isabstract(x) and _arguments_of(x)]


def _last_word(key: str) -> str:
    return key.rpartition(".")[2]


def _subclasses(base: type) -> set[type]:
    children: list[type] = base.__subclasses__()
    return set(children).union(*map(_subclasses, children))


_COMPLAINTS: dict[str, Callable[..., str]] = {
    r"Option '([^']+)' is not accepted": _unknown_argument,
    r"arguments are required: (.+)": (
        lambda place, names: f"{place.key}: {_last_word(place.class_path)} needs {names}."
    ),
    r"Expected a dot import path string: (\S+)": _unknown_class,
    r"(?:Not a valid subclass of \w+|import path or .*)\. Got value: (.+)": _unknown_class,
    r"(No module named '.+'|module '.+' has no attribute '.+')": _not_importable,
    r"Multiple subclasses with name (\w+)\..*: (.+)\.$": (
        lambda place, name, paths: (
            f"{place.key}: there are several classes {name!r}; give one of {paths}."
        )
    ),
    r"Import path (\S+) does not correspond to a subclass of (\w+)": (
        lambda place, path, base: f"{place.key}: {path!r} is not a subclass of {base}."
    ),
    r"Expected an? (.+?)\. Got value: ?(.*?)(?:\. Got value: .*)?$": (
        lambda place, types, value: _expected(place.key, _type_name(types), value, types)
    ),
}


def _explain_option(message: str, options: list[str]) -> str:
    """Return the line for an option that the command does not have, or `""`."""
    if missing := re.search(r"arguments are required: (.+)", message):
        example = next(iter(shipped_configs()), "my.yaml")
        keys = ", ".join(f"--{key.partition('.')[2]}" for key in missing[1].split(", "))
        return f"required: {keys}; or give a config that has them, such as --config {example}."
    other = r"does not accept option '([^']+)'|Key must be a string, got: (.+)\."
    unknown = re.search(rf"unrecognized arguments: (\S+)|{other}", message)
    if not unknown:
        return ""
    given = (unknown[1] or unknown[2] or unknown[3]).partition("=")[0]
    if unknown[1] and not given.startswith("-"):
        return f"unexpected argument {given!r}; options start with --."
    dashes, name = ("--", given.lstrip("-")) if unknown[1] else ("", given)
    hint = nearest(name, _candidates(name, options)).replace("'", f"'{dashes}", 1)
    return f"there is no option '{dashes}{name}'.{hint}"


def _candidates(name: str, options: list[str]) -> list[str]:
    """Return what `name` may have meant; of keys under `model.` the first word alone is known."""
    head, dot, rest = name.partition(".")
    heads = {option.partition(".")[0] for option in options}
    groups = {option.partition(".")[0] for option in options if "." in option} | {"model", "data"}
    return options if head in heads else [*options, *(f"{other}{dot}{rest}" for other in groups)]


def _explain_value(key: str, message: str) -> str:
    """Return the line for a value of no allowed type; else what the first attempt ended with."""
    found = re.search(r"([\s\S]*?)Given value:(?! NestedArg) ?(.*)", message)
    account, value = found.groups() if found else ("", "")
    tried = re.findall(r"Expected an? (?!path)(.+)", account)
    if not (key and tried):
        first_attempt = message.partition("- Expected a <class 'NoneType'>")[0].strip()
        reason = first_attempt.splitlines()[-1].strip(" -") if key else message
        return " ".join([f"{key}:" if key else "", *reason.split()]).strip()
    if "Not a valid subclass of" in account:
        return _unknown_class(Place(key), value)
    types = [
        name for name in dict.fromkeys(map(_type_name, tried)) if not name.startswith("one of")
    ]
    literals = _literals(" ".join(tried))
    if literals:
        types.insert(0, f"one of {', '.join(map(repr, literals))}")
    return _expected(key, " or ".join(types), value, account)


def _expected(key: str, types: str, value: str, account: str) -> str:
    return f"{key}: expected {types}, received {cut(value)}.{nearest(value, _literals(account))}"


def _literals(account: str) -> list[str]:
    literals = re.findall(r"Literal\[(.+?)\]", account)
    return list(dict.fromkeys(re.findall(r"'([^']*)'", ", ".join(literals))))


def _type_name(name: str) -> str:
    """Return `int` for `<class 'int'>` and `one of 'a', 'b'` for `typing.Literal['a', 'b']`.

    >>> _type_name("<class 'NoneType'>")
    'null'
    """
    name = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", name)
    name = re.sub(r"typing\.Literal\[(.+)\]", r"one of \1", name)
    return {"NoneType": "null", "Iterable": "a list"}.get(name, name)


def _load(text: str) -> Any:
    try:
        check_yaml(text)
        return get_loader("yaml")(text)
    except Exception as error:  # of any kind, as in `load_yaml`
        raise YAMLError(describe_error(error)) from error


set_loader("checked_yaml", _load, (YAMLError,))


_BATCHES = "accumulate_grad_batches|check_val_every_n_epoch|val_check_interval"
_ABOVE_0 = re.compile(rf"trainer\.({_BATCHES})|.*\blr_scheduler\.(step_size\w*|T_\w+)")
_FROM_0 = re.compile(r"trainer\.(gradient_clip_val|log_every_n_steps|min_epochs|min_steps)")


def check_numbers(options: Any, key: str = "") -> None:
    """Raise InputError for a NaN, a schedule that is infinite, or less than a setting's least."""
    options = vars(options) if isinstance(options, Namespace) else options
    if isinstance(options, dict | list):
        items = options.items() if isinstance(options, dict) else enumerate(options)
        for name, value in items:
            check_numbers(value, f"{key}.{name}".removeprefix(".").removesuffix(".init_args"))
    elif isinstance(options, float | int):
        must_end = key == "trainer.gradient_clip_val" or "lr_scheduler" in key
        if options != options or (must_end and options in (math.inf, -math.inf)):
            raise InputError(f"{key} is {options}; give a finite number.")
        if options < 0 and _FROM_0.fullmatch(key):
            raise InputError(f"{key} is at least 0, got {options}.")
        if options <= 0 and _ABOVE_0.fullmatch(key):
            raise InputError(f"{key} is above 0, got {options}.")


class HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's, with a line for each text, since `lay_out` breaks no word."""

    def __init__(self, prog: str, **options: Any) -> None:
        ours = {"max_help_position": 8, "width": 100_000}
        super().__init__(prog, **{**options, **ours})  # type: ignore[no-untyped-call]


class Parser(LightningArgumentParser):
    """LightningCLI's parser, except that a parse error is an InputError of one line."""

    def __init__(self, **kwargs: Any) -> None:
        for base, package in KINDS.values():
            exported_classes(base, package)  # jsonargparse finds by its name what is imported
        ours = {"parser_mode": "checked_yaml", "formatter_class": HelpFormatter}
        super().__init__(**{**ours, **kwargs})

    def format_help(self, *formatter: Any) -> str:
        plain = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"\1", super().format_help(*formatter))
        return lay_out(plain, terminal_width() or HELP_WIDTH)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)  # jsonargparse's own attempts, which it collects
        raise InputError(explain_parse_error(message, self._options())) from ex

    def _options(self) -> list[str]:
        """Return the keys of this parser, or, of the one with the subcommands, of the first."""
        for action in self._actions:
            if isinstance(action.choices, dict):
                subcommand: Parser = next(iter(action.choices.values()))
                return subcommand._options()
        return [action.dest for action in self._actions if action.option_strings]


class ConfigFile(ActionConfigFile):
    """`--config` that also takes the name of a shipped config."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
        value = values if is_config_text(values) else str(find_config(values))
        self.apply_config(parser, cfg, self.dest, value)
