"""The argument parser of `nm`: shipped configs by name, errors as one line."""

from typing import Any, NoReturn

from jsonargparse import ActionConfigFile
from pytorch_lightning.cli import LightningArgumentParser

from nmlightning.commands.config_files import find_config, is_config_text
from nmlightning.commands.parse_errors import explain_parse_error
from nmlightning.errors import InputError


class Parser(LightningArgumentParser):
    """LightningCLI's parser, except that a parse error is an InputError of one line."""

    @classmethod
    def with_config_option(cls, **kwargs: Any) -> "Parser":
        """Return a parser that takes configs."""
        parser = cls(**kwargs)
        parser.add_argument(
            "-c", "--config", action=ConfigFile, help="A config file, or the name of a shipped one."
        )
        return parser

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
