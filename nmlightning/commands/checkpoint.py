"""Checkpoints: the options that their hyper-parameters are, and the modules that they hold."""

import json
import pickle
from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.cli import instantiate_module
from torch import nn

from nmlightning.commands.failures import explain_failures
from nmlightning.commands.files import SHARED_FILE, config_of, is_whole, read_config
from nmlightning.commands.parser import Parser
from nmlightning.errors import InputError
from nmlightning.named_code import check_named_code, typed_classes
from nmlightning.surgery.checkpoints import load_from_checkpoint

if TYPE_CHECKING:
    from nmlightning.export.half_safe import Evaluation

VALIDATION_BATCHES = 16  # of an evaluation before and after a swap
_INSTANTIATOR = f"{instantiate_module.__module__}.{instantiate_module.__name__}"

_ENTRIES: dict[str, type] = {
    **dict.fromkeys(("hyper_parameters", "state_dict", "callbacks", "loops"), dict),
    **dict.fromkeys(("optimizer_states", "lr_schedulers"), list),
    **{"pytorch-lightning_version": str, "epoch": int, "global_step": int},
}


def checkpoint_hparams(checkpoint: str, typed: Collection[str] = ()) -> list[str]:
    """Return the model's hyper-parameters in `checkpoint` as a `--config`, to be placed first.

    Whatever comes after it on the command line, in configs or as options, wins. The user trusts the
    classes that they have `typed`.
    """
    if "://" in checkpoint:
        return []
    path = Path(checkpoint)
    if path.is_dir():
        path /= SHARED_FILE
        if not path.exists():
            return []
    try:
        content = _load(path, "--ckpt_path: ")
    except pickle.UnpicklingError:
        return []  # objects of the user's own, which the Trainer judges when it loads them
    if not isinstance(content, dict):
        raise InputError(f"--ckpt_path: {str(path)!r} is not a checkpoint of Lightning.")
    model = _model_config(content.get("hyper_parameters", {}))
    check_named_code(model, f"--ckpt_path: {checkpoint}", typed)
    return ["--config", json.dumps({"model": model})] if model else []


class Checkpoint:
    """The LightningModule in a checkpoint, with the settings of its run.

    The settings are the checkpoint's hyper-parameters, then the config that `nm fit` has saved
    beside it. A config that is given, with a `model`, a `data` or both, wins over both.
    """

    def __init__(self, path: Path, config: str | None) -> None:
        self.path = path
        saved, given = config_of(path), read_config(config) if config else {}
        self._settings = read_config(str(saved)) if saved else {}
        used, named = ([x.get("model"), x.get("data")] for x in (self._settings, given))
        typed = typed_classes(named)
        check_named_code(used, str(saved), typed)
        try:
            content = _load(path)
        except pickle.UnpicklingError as error:
            raise InputError(
                f"{str(path)!r} holds objects, which may run code: if you trust it, load it in "
                "Python with weights_only=False and call nmlightning.export_network."
            ) from error
        if not (isinstance(content, dict) and content.get("state_dict")):
            reason = "it has no state_dict, or an empty one"
            raise InputError(f"{str(path)!r} holds no weights: {reason}.")
        if model := _model_config(content.get("hyper_parameters", {})):
            check_named_code(model, str(path), typed)
            self._settings["model"] = model
        self._settings.update(given)

    @explain_failures()
    def load_module(self) -> LightningModule:
        """Return the module, with norms and weights as they were in training, on the CPU."""
        settings = self._settings.get("model")
        if settings is None:
            raise InputError(
                f"{str(self.path)!r} does not name the class of its model, and there is no "
                "config.yaml of its run: give one that has a model by --config, or load it in "
                "Python and call nmlightning.export_network."
            )
        module, _, name = (
            _parser().parse_object({"model": settings}).model.class_path.rpartition(".")
        )
        arguments = settings.get("init_args", {}) if isinstance(settings, dict) else {}
        try:
            return load_from_checkpoint(  # type: ignore[no-any-return]
                getattr(import_module(module), name),
                self.path,
                map_location="cpu",
                _instantiator=_INSTANTIATOR,
                **arguments,
            )
        except RuntimeError as error:  # torch's list of keys and shapes that differ
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{str(self.path)!r} does not fit: {reason}") from error

    @explain_failures()
    def input_shape(self) -> tuple[int, ...]:
        """Return the shape of the model's input, from the data's `image_shape`."""
        data, reason = self._load_data(), "no config.yaml of its run is beside it"
        shape = getattr(data, "image_shape", None)
        reason = reason if data is None else f"{type(data).__name__} has none"
        if shape is None:
            raise InputError(
                f"the shape of an input is not known: {reason}. Give it by --input_shape, such as "
                "3,32,32."
            )
        return tuple(shape)

    def _load_data(self) -> LightningDataModule | None:
        if (settings := self._settings.get("data")) is None:
            return None
        parser = _parser()
        return parser.instantiate_classes(parser.parse_object({"data": settings})).data  # type: ignore[no-any-return]

    @explain_failures()
    def evaluation(
        self, module: LightningModule, name: str, batches: int = VALIDATION_BATCHES
    ) -> "Evaluation | None":
        """Return what validates the module, with another network as `name`, if there are data."""
        data = self._load_data()
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            limit_val_batches=batches,
        )

        def evaluate(net: nn.Module) -> dict[str, float]:
            if name:
                module.set_submodule(name, net)
            return dict(trainer.validate(module, data, verbose=False)[0])

        return None if data is None else evaluate


def load_data(options: list[str], prog: str) -> LightningDataModule:
    """Return the data module that options of the command line name, such as --data Digits."""
    parser = _parser(prog)
    data = parser.instantiate_classes(parser.parse_args(options)).data
    if data is None:
        raise InputError("no data module is named: give --data, such as --data Digits.")
    return data  # type: ignore[no-any-return]


def _model_config(hyper_parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the model's class and arguments, if the command line has made it."""
    arguments = dict(hyper_parameters)
    class_path = arguments.pop("_class_path", None)
    arguments.pop("_instantiator", None)
    return None if class_path is None else {"class_path": class_path, "init_args": arguments}


def _load(path: Path, option: str = "") -> Any:
    broken = InputError(f"{option}{str(path)!r} is not a checkpoint, or is truncated.")
    if not is_whole(path):
        raise broken
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:  # a zip file of something else
        raise broken from error
    for key, expected in _ENTRIES.items() if isinstance(content, dict) else ():
        if not isinstance(content.get(key, expected()), expected):
            raise InputError(
                f"{option}{str(path)!r} is damaged: its {key!r} is of type "
                f"{type(content[key]).__name__}, not {expected.__name__}."
            )
    return content


def _parser(prog: str = "nm export") -> Parser:
    parser = Parser(prog=prog)
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True, required=False)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=False)
    return parser
