"""The LightningModule that a checkpoint was written of, and the inputs of its data."""

import pickle
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.cli import instantiate_module

import nmlightning.commands.fit  # noqa: F401
from nmlightning.commands.files import config_of, model_in, read_config
from nmlightning.commands.parser import Parser
from nmlightning.errors import InputError
from nmlightning.surgery.checkpoints import load_from_checkpoint

# Class names alone, as a config may have them, resolve only if their modules are imported.

_INSTANTIATOR = f"{instantiate_module.__module__}.{instantiate_module.__name__}"


class SavedModule:
    """The LightningModule of a checkpoint, with the settings of its run.

    The settings are those that the checkpoint remembers, and what it does not is in the config
    that `nm fit` has saved beside it. A config that is given wins over both.

    Args:
        checkpoint: the file.
        config: a config with a `model`, a `data` or both, or None.

    Raises:
        InputError: the file is no checkpoint, or holds no weights.
    """

    def __init__(self, checkpoint: Path, config: str | None) -> None:
        self.checkpoint = checkpoint
        content = _read_checkpoint(checkpoint)
        saved = config_of(checkpoint)
        self._settings = read_config(str(saved)) if saved else {}
        remembered = model_in(content.get("hyper_parameters", {}))
        if remembered:
            self._settings["model"] = remembered
        if config:
            self._settings.update(read_config(config))

    def load(self) -> LightningModule:
        """Return the module, with norms and weights as they were in training, on the CPU.

        Raises:
            InputError: it is not known of what class it is, or it is another class's.
        """
        settings = self._settings.get("model")
        if settings is None:
            raise InputError(
                f"{str(self.checkpoint)!r} does not say of what class its model is, and no "
                "config.yaml of its run is beside it: give one that has a model by --config, or "
                "load it in Python and call nmlightning.export_network."
            )
        module_class = _import(_parser().parse_object({"model": settings}).model.class_path)
        arguments = settings.get("init_args", {}) if isinstance(settings, dict) else {}
        try:
            return load_from_checkpoint(  # type: ignore[no-any-return]
                module_class,
                self.checkpoint,
                map_location="cpu",
                _instantiator=_INSTANTIATOR,
                **arguments,
            )
        except RuntimeError as error:  # torch's list of keys and shapes that differ
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{str(self.checkpoint)!r} does not fit: {reason}") from error

    def input_shape(self) -> tuple[int, ...]:
        """Return the shape of what the model gets, from the data's `image_shape`.

        Raises:
            InputError: there are no settings of the data, or these know no shape.
        """
        settings = self._settings.get("data")
        shape, known = None, "no config.yaml of its run is beside it"
        if settings is not None:
            parser = _parser()
            data = parser.instantiate_classes(parser.parse_object({"data": settings})).data
            shape, known = getattr(data, "image_shape", None), f"{type(data).__name__} has none"
        if shape is None:
            raise InputError(
                f"the shape of an input is not known: {known}. Say it by --input_shape, such as "
                "3,32,32."
            )
        return tuple(shape)


def _read_checkpoint(path: Path) -> dict[str, Any]:
    broken = InputError(f"{str(path)!r} is no checkpoint, or a truncated one.")
    if not zipfile.is_zipfile(path):
        raise broken
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{str(path)!r} holds objects, and to load these may run code: load it in Python with "
            "weights_only=False if you trust it, and call nmlightning.export_network."
        ) from error
    except RuntimeError as error:  # a zip file of something else
        raise broken from error
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if not weights:
        raise InputError(f"{str(path)!r} holds no weights: it has no state_dict, or an empty one.")
    return dict(content)


def _parser() -> Parser:
    parser = Parser(prog="nm export")
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True, required=False)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=False)
    return parser


def _import(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    return getattr(import_module(module), name)
