"""Batches in which an experiment, or any model, is measured and nothing is learned."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.optim import Optimizer

from nmlightning.callbacks.norm_swap import ModelChange
from nmlightning.commands.argument_parser import ArgumentParser
from nmlightning.commands.checkpoint import Checkpoint, checkpoint_hparams, load_data
from nmlightning.commands.failures import explain_failures, filter_logs
from nmlightning.commands.files import RunPaths, is_checkpoint
from nmlightning.commands.fit import TrainingCLI, given_callbacks, is_ctrl_c
from nmlightning.commands.own_models import bind_inputs, is_own_model, load_model, read_arrays
from nmlightning.commands.run_report import print_notice
from nmlightning.errors import InputError
from nmlightning.export.half_safe import Evaluation
from nmlightning.export.onnx_values import BATCH_SIZE, OnnxFile
from nmlightning.probe.directions import Directions, DirectionWatch
from nmlightning.probe.inference import probe_inference
from nmlightning.probe.probe import NormWatch
from nmlightning.probe.report import NormRanges


def run_batches(
    options: list[str], paths: RunPaths, batches: int, bits: Sequence[int]
) -> tuple[NormRanges | InputError, Directions]:
    """Run training batches through the experiment that `options` of `nm fit` describe.

    Of a network without norms the first is the reason why nothing is known of these.
    """
    with filter_logs(), torch.compiler.set_stance("force_eager"):
        stored = checkpoint_hparams(paths.checkpoint) if paths.checkpoint else []
        watcher = _Watcher(batches, bits, paths.checkpoint)
        try:
            arguments = ["fit", *stored, *options, "--ckpt_path", "null"]
            _ProbeCLI(arguments, paths.run_name, watcher)
        except SystemExit as stop:
            if is_ctrl_c(stop):
                raise KeyboardInterrupt from None
            raise
    if watcher.watches is None:
        raise InputError("No batch was run: the training data are empty.")
    norms, layers = watcher.watches
    directions = layers.directions()
    try:
        return norms.ranges(), directions
    except InputError as error:
        if not directions.layers:
            raise
        return error, directions


@filter_logs()
@explain_failures()
def run_inference(given: argparse.Namespace, options: list[str]) -> tuple[NormRanges, str]:
    """Return what `probe_inference` says of a file, a module or a run, and what its inputs are."""
    name, shapes = given.experiment, given.input_shape or ()
    model, own_data, options = _load(name, options, given.batches)
    file = model if isinstance(model, OnnxFile) else None
    data = load_data(options, "nm probe") if options else None
    if (given.inputs is not None) + bool(shapes) + (data is not None) > 1:
        raise InputError("--inputs, --input_shape and --data are three sources: give one.")
    batches: Iterator[Any]
    if given.inputs:
        arrays = read_arrays(given.inputs)
        batches = iter([arrays if file else bind_inputs(model, arrays)])
        inputs = str(given.inputs)
    elif data:
        batches = _validation(data, len(file.inputs) if file else 1)
        inputs = f"{given.batches} validation batches of {type(data).__name__}"
    elif shapes or file:
        drawn = file.draw_inputs(shapes) if file else ()
        batches = iter([drawn or tuple(torch.randn(BATCH_SIZE, *shape) for shape in shapes)])
        inputs = "random: these ranges say little; give --inputs x.npz or --data NAME"
    elif evaluate := own_data():
        batches = iter([evaluate])
        inputs = f"validation batches of its own data, {given.batches} at most"
    else:
        raise InputError(
            f"what {name} takes is not known: give --inputs x.npz, --data NAME, or --input_shape "
            "3,32,32 for random numbers."
        )
    return probe_inference(model, islice(batches, given.batches)), inputs


def _load(
    name: str, options: list[str], batches: int
) -> tuple[Any, Callable[[], Evaluation | None], list[str]]:
    """Return a model, a function for what validates it on its own data, and the options left."""
    if name.endswith(".onnx"):
        return OnnxFile(Path(name)), lambda: None, options
    if is_own_model(name):
        return load_model(name), lambda: None, options
    if not is_checkpoint(name):
        module, evaluate = _load_config(name, options, batches)
        return module, lambda: evaluate, []
    parser = ArgumentParser(prog="nm probe", add_help=False)
    parser.add_argument("-c", "--config")
    given, options = parser.parse_known_args(options)
    run = Checkpoint(Path(name), given.config)
    module = run.load_module()
    return module, lambda: run.evaluation(module, "", batches), options


def _validation(data: pl.LightningDataModule, count: int) -> Iterator[Any]:
    """Yield the first so many tensors of each validation batch, or all if they have names."""
    data.prepare_data()
    data.setup("fit")
    for batch in data.val_dataloader():
        batch = data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)
        yield batch if isinstance(batch, dict) else batch[:count]


def _load_config(
    name: str, options: list[str], batches: int
) -> tuple[pl.LightningModule, Evaluation]:
    """Return the module of a config, as its callbacks change it, and what validates it."""
    words = ["--config", name, *options]
    paths = RunPaths(["probe", *words])
    if paths.checkpoint:
        raise InputError(
            f"for inference name the checkpoint in the config's place: nm probe {paths.checkpoint} "
            "--inference."
        )
    cli = _ProbeCLI(["fit", *words], paths.run_name, None, batches)

    def evaluate(_: object) -> dict[str, float]:
        cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
        return {}

    evaluate(None)  # in whose setup norms are swapped
    return cli.model, evaluate


class _ProbeCLI(TrainingCLI):
    """`nm fit` up to the first batches; without a watcher nothing but the objects."""

    def __init__(
        self, arguments: list[str], run_name: str, watcher: "_Watcher | None", validated: int = 0
    ) -> None:
        self._watcher, self._validated = watcher, validated
        super().__init__(arguments, run_name)

    def before_instantiate_classes(self) -> None:
        self.save_config_callback = None
        self.config[self.subcommand].trainer.logger = False

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Return a Trainer on the chosen device that keeps nothing, and what changes the model."""
        options = self.config_init[self.subcommand].trainer
        changes = [c for c in given_callbacks(options) if isinstance(c, ModelChange)]
        return pl.Trainer(
            accelerator=options.accelerator,
            devices=1,
            precision="32-true",
            max_epochs=1,
            limit_val_batches=self._validated,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*changes, *([self._watcher] if self._watcher else [])],
        )

    def fit(self, model: pl.LightningModule, **kwargs: Any) -> None:
        if not (self._watcher and self._watcher.checkpoint):
            print_notice("no checkpoint is given; these weights are untrained.")
        if self._watcher:
            with explain_failures(), suppress(_EnoughError):
                self.trainer.fit(model, datamodule=kwargs.get("datamodule"))


class _EnoughError(Exception):
    """Ends the epoch, before schedulers and the user's own hooks ask for its results."""


class _Watcher(pl.Callback):
    """Loads the weights, measures the layers for some batches, and lets no weight move."""

    def __init__(self, batches: int, bits: Sequence[int], checkpoint: str | None) -> None:
        self.batches = batches
        self.bits = bits
        self.checkpoint = checkpoint
        self.watches: tuple[NormWatch, DirectionWatch] | None = None
        self._watching = ExitStack()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Load the weights, as a Trainer does that does not resume the run."""
        if self.checkpoint is not None:
            checkpoint = trainer.strategy.load_checkpoint(self.checkpoint)
            pl_module.on_load_checkpoint(checkpoint)
            trainer.strategy.load_model_state_dict(checkpoint, strict=pl_module.strict_loading)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.watches = NormWatch(pl_module), DirectionWatch(pl_module, self.bits)
        for watch in self.watches:
            self._watching.enter_context(watch)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for watch in self.watches or ():
            watch.end_batch()
        if batch_idx + 1 >= min(self.batches, trainer.num_training_batches):
            self._watching.close()
            raise _EnoughError

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Take the gradients away: without one, no optimizer moves a weight."""
        optimizer.zero_grad(set_to_none=True)
