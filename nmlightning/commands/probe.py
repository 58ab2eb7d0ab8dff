"""`nm probe`: what the norms of a network get, and what half precision would make of it."""

import argparse
import json
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from torch.optim import Optimizer

from nmlightning.callbacks.model_change import ModelChange
from nmlightning.commands import run_report
from nmlightning.commands.argument_parser import ArgumentParser
from nmlightning.commands.files import (
    CHECKPOINTS,
    GivenFiles,
    check_replaceable,
    remembered_options,
    write_file,
)
from nmlightning.commands.fit import TrainingCLI, given_callbacks, is_ctrl_c
from nmlightning.commands.run_report import quiet
from nmlightning.errors import InputError
from nmlightning.probe.chart import GENERATOR, Band, draw_ranges
from nmlightning.probe.probe import NormWatch
from nmlightning.probe.report import (
    FAILING,
    FAILURE_LABELS,
    NAMES,
    REMEDY,
    LayerRanges,
    NormRanges,
    verdict,
)
from nmlightning.reports.formatting import format_loss

_DEFAULT_PICTURE = Path("norm_ranges.svg")
_DEFAULT_BATCHES = 2
_NARROWEST_NAME = 16  # characters
_JSON_MARK = '"generator": "nm probe"'


def run(arguments: list[str]) -> int:
    """Run `nm probe` and return its exit code: 0, whatever the norms would do.

    Raises:
        InputError: a config or checkpoint that does not exist, a network without norms, no data,
            or a file that would replace other work.
    """
    given, options = _parse(arguments)
    check_replaceable("--picture", given.picture, GENERATOR, "picture of nm probe")
    if given.json:
        check_replaceable("--json", given.json, _JSON_MARK, "answer of nm probe")
    words = ["probe", *_experiment(given.experiment, options), *options]
    files = GivenFiles(words)  # a misspelt file is reported before torch is imported
    pass

    ranges = run_batches(words[1:], files, given.batches)
    _print_table(ranges)
    for sentence in verdict(ranges):
        Console().print(Padding(escape(sentence), (0, 0, 0, 1), expand=False), highlight=False)
    _write(given, ranges)
    return 0


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return what is given, and the options that are those of `nm fit`."""
    parser = ArgumentParser(
        prog="nm probe",
        allow_abbrev=False,
        usage="nm probe CONFIG|CHECKPOINT [--batches N] [--picture FILE] [--json FILE] "
        "[--KEY VALUE ...]",
        description="Run some training batches through a network, change nothing, and report for "
        "each norm layer the range of its inputs and what L2, L1, L∞, Top(10) and range would make "
        "of them with every value in float16.",
        epilog="Every other option is one of nm fit, such as --data Digits.",
    )
    parser.add_argument(
        "experiment",
        metavar="CONFIG|CHECKPOINT",
        help="a config, or a checkpoint of a run, whose config.yaml is found beside it or given "
        "by --config",
    )
    parser.add_argument(
        "--batches", type=int, default=_DEFAULT_BATCHES, help="how many (default: %(default)s)"
    )
    parser.add_argument(
        "--picture",
        type=Path,
        default=_DEFAULT_PICTURE,
        help="the SVG to write (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, help="where to write the numbers, if they are wanted")
    if arguments and arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"):
        parser.error(f"the config or checkpoint comes first, got {arguments[0]!r}")
    given, options = parser.parse_known_args(arguments)
    if given.batches < 1:
        parser.error(f"argument --batches: at least 1, got {given.batches}")
    return given, options


def _experiment(name: str, options: Sequence[str]) -> list[str]:
    """Return the options of `nm fit` that name the config and, if it is one, the checkpoint."""
    if not _is_checkpoint(name):
        return ["--config", name]
    if any(word.split("=")[0] in ("-c", "--config") for word in options):
        return ["--ckpt_path", name]
    config = Path(name).parent.parent / "config.yaml"
    if Path(name).exists() and not (config.is_file() and Path(name).parent.name == CHECKPOINTS):
        raise InputError(f"{name} is in no folder of a run with a config.yaml; give --config.")
    return [*(["--config", str(config)] if config.is_file() else []), "--ckpt_path", name]


def _is_checkpoint(name: str) -> bool:
    return name.endswith(".ckpt") or zipfile.is_zipfile(name)


def _print_table(ranges: NormRanges) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("norm layer", overflow="fold", min_width=_NARROWEST_NAME)
    losses = [NAMES[norm] for norm in ranges.norms]
    lost_in_input = ranges.input_share() > 0
    for heading in ("σ min", "σ max", "max |x − μ|", *losses, *["input"] * lost_in_input):
        table.add_column(heading, justify="right", no_wrap=heading != NAMES[FAILING])
    for layer in ranges.layers:
        cells = [_norm_cell(layer, norm, how=norm == FAILING) for norm in ranges.norms]
        if lost_in_input:
            cells.append(_coloured(layer.input_share(), format_loss(layer.input_share())))
        table.add_row(escape(layer.name), *_size_cells(layer), *cells)
    Console().print(table)
    for reason, count in Counter(ranges.left_out.values()).items():
        first = next(name for name, why in ranges.left_out.items() if why == reason)
        _print_line("left out", f"{first}{f' and {count - 1} more' * (count > 1)}: {reason}")


def _size_cells(layer: LayerRanges) -> list[str]:
    scales = layer.finite_scales
    sizes = [scales.min(), scales.max()] if len(scales) else [float("nan")] * 2
    return [f"{size:.3g}" for size in (*sizes, layer.largest_deviation)]


def _norm_cell(layer: LayerRanges, norm: str, *, how: bool) -> str:
    share, lost = layer.lost_share(norm), layer.lost(norm)
    way = f" {FAILURE_LABELS[max(lost, key=lambda way: lost[way])]}" if how and lost else ""
    others = ", …" if way and len(lost) > 1 else ""
    return _coloured(share, format_loss(share) + way + others)


def _coloured(share: float | None, text: str) -> str:
    return f"[red]{text}[/red]" if share else text


def _write(given: argparse.Namespace, ranges: NormRanges) -> None:
    write_file("--picture", given.picture, draw_ranges(ranges.layers, *_bands(ranges)))
    _print_line("picture", given.picture)
    if given.json:
        content = {"generator": "nm probe", **ranges.as_plain()}
        write_file("--json", given.json, json.dumps(content, indent=1, allow_nan=False) + "\n")
        _print_line("numbers", given.json)


def _bands(ranges: NormRanges) -> list[Band]:
    """Return what the norms can take, at the smallest eps of the layers."""
    from nmlightning.probe.fp16_emulation import fp16_limits

    eps = min(layer.eps for layer in ranges.layers)
    limits = {norm: fp16_limits(norm, eps) for norm in (REMEDY, FAILING)}
    names = {REMEDY: "L1 in half", FAILING: "L2 in half, op by op"}
    return [
        Band(norm, names[norm], limit.smallest_scale, limit.largest_deviation)
        for norm, limit in limits.items()
    ]


def _print_line(heading: str, text: object) -> None:
    Console().print(f" {heading:<11} {text}", soft_wrap=True, highlight=False, markup=False)


def run_batches(options: list[str], given: GivenFiles, batches: int) -> NormRanges:
    """Run training batches through the experiment that `options` describe, and look on.

    Args:
        options: those of `nm fit`.
        given: the files that these name.
        batches: how many.
    """
    with quiet(), torch.compiler.set_stance("force_eager"):
        words = [*remembered_options(given.checkpoint), *options, "--ckpt_path", "null"]
        watcher = _Watcher(batches, given.checkpoint)
        try:
            _ProbeCLI(["fit", *words], given.run_name, watcher)
        except SystemExit as stop:
            if is_ctrl_c(stop):
                raise KeyboardInterrupt from None
            raise
    if watcher.ranges is None:
        raise InputError("No batch was run: the training data are empty.")
    return watcher.ranges


class _ProbeCLI(TrainingCLI):
    """`nm fit` up to the first batches."""

    def __init__(self, arguments: list[str], run_name: str, watcher: "_Watcher") -> None:
        self._watcher = watcher
        super().__init__(arguments, run_name)

    def before_instantiate_classes(self) -> None:
        """Make no folder."""
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
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*changes, self._watcher],
        )

    def fit(self, model: pl.LightningModule, **kwargs: Any) -> None:
        """Run the batches."""
        if self._watcher.checkpoint is None:
            run_report.print_notice("no checkpoint is given; these weights are untrained.")
        with suppress(_EnoughError):
            self.trainer.fit(model, datamodule=kwargs.get("datamodule"))


class _EnoughError(Exception):
    """Ends the epoch, before schedulers and the user's own hooks ask for its results."""


class _Watcher(pl.Callback):
    """Loads the weights, looks into the norms for some batches, and lets no weight move.

    Args:
        batches: how many.
        checkpoint: of the weights, or None.
    """

    def __init__(self, batches: int, checkpoint: str | None) -> None:
        self.batches = batches
        self.checkpoint = checkpoint
        self.ranges: NormRanges | None = None
        self._watch: NormWatch | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Load the weights, as a Trainer does that is not to go on with the run."""
        if self.checkpoint is not None:
            checkpoint = trainer.strategy.load_checkpoint(self.checkpoint)
            pl_module.on_load_checkpoint(checkpoint)
            trainer.strategy.load_model_state_dict(checkpoint, strict=pl_module.strict_loading)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._watch = NormWatch(pl_module)
        self._watch.__enter__()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: torch.Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert self._watch is not None, "training has started"
        self._watch.end_batch()
        if batch_idx + 1 >= min(self.batches, trainer.num_training_batches):
            self._watch.__exit__()
            self.ranges = self._watch.ranges()
            raise _EnoughError

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Take the gradients away: without one, no optimizer moves a weight."""
        optimizer.zero_grad(set_to_none=True)
