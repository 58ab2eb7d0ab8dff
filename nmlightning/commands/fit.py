"""`nm fit`, `validate`, `test` and `predict`: LightningCLI with a named folder for every run.

Lightning, torchrun or SLURM may start several processes with the same command line. The first, rank
0, keeps the run and prints; a process that fails ends the others with it.
"""

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse import Namespace, dict_to_namespace
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import BasePredictionWriter, ModelCheckpoint, ProgressBar
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import Strategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException

from nmlightning.callbacks import checkpoints
from nmlightning.callbacks.norm_swap import NormSwap
from nmlightning.callbacks.weight_norm_swap import WeightNormSwap
from nmlightning.commands import run_report
from nmlightning.commands.argument_parser import DIVERGED, INTERRUPTED, TERMINATED
from nmlightning.commands.checkpoint import checkpoint_hparams
from nmlightning.commands.failures import explain_failures, failing_together, filter_logs
from nmlightning.commands.files import (
    RunPaths,
    default_logger,
    new_version,
    remove_made,
    time_written,
)
from nmlightning.commands.parser import ConfigFile, Parser, check_numbers
from nmlightning.compat import copying_strategy, replace_torch_io
from nmlightning.errors import InputError, cut, input_error_in, repr_by_arguments
from nmlightning.norms.registry import check_fuse
from nmlightning.tasks.numerics import SoundNumerics, larger_eps

MOST_DEVICES = 64  # of a machine, where the CPU has fewer cores
HALF = ("16-mixed", "16", 16)  # which Lightning makes bf16-mixed without a GPU
SWITCHES = {  # both are on
    "keep_freed_memory": "On a CPU, keep freed memory for the next step, where it is glibc's.",
    "build_kernels": "Build the kernels for this CPU in the background, if a fit misses them.",
}
ORDERS = ("min", "max")  # of the metric of a ModelCheckpoint


def run(arguments: list[str], paths: RunPaths) -> int:
    """Run `nm fit`, `validate`, `test` or `predict` and return its exit code."""
    command, *options = arguments
    with filter_logs():
        try:
            stored = checkpoint_hparams(paths.checkpoint, paths.typed) if paths.checkpoint else []
            resolved: list[str] = []
            if paths.wants_last:
                found = paths.checkpoint
                for damaged in paths.damaged:
                    run_report.print_notice(f"{damaged} is damaged, and passed over.")
                lack = "whole checkpoint" if paths.damaged else "checkpoint yet"
                nothing = f"{paths.runs} has no {lack}, so training starts anew."
                run_report.print_notice(f"--ckpt_path last is {found}" if found else nothing)
                resolved = ["--ckpt_path", found or "null"]
            TrainingCLI([command, *stored, *options, *resolved], paths.run_name)
        except SystemExit as stop:
            if is_ctrl_c(stop):
                raise KeyboardInterrupt from None
            if isinstance(stop, SIGTERMException):
                return TERMINATED
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


class TrainingCLI(LightningCLI):
    """LightningCLI for any model and data; its constructor runs the command, in `runs/run_name`."""

    def __init__(self, arguments: list[str], run_name: str) -> None:
        self._command = command = arguments[0]
        self._run_name = run_name
        self._logger_is_given = any(word.startswith("--trainer.logger") for word in arguments)
        self._watch = run_report.Stopwatch()
        self._began = 0.0  # by the clock of the file system
        self._end = checkpoints.EndCheckpoint()
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_class=Parser,
            parser_kwargs={
                "prog": "nm",
                "allow_abbrev": False,
                # The whole list of options follows, each with its meaning.
                command: {"usage": f"nm {command} --config CONFIG [--KEY VALUE ...]"},
            },
            trainer_defaults={"logger": default_logger(run_name), "enable_model_summary": False},
            args=arguments,
        )

    def init_parser(self, **kwargs: Any) -> Parser:
        """Return a parser whose `--config` knows the shipped configs."""
        parser = Parser(**kwargs)
        parser.add_argument(
            "-c", "--config", action=ConfigFile, help="A config file, or the name of a shipped one."
        )
        return parser

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the command that runs, alone: a parser of all takes a second to make."""
        return {self._command: LightningCLI.subcommands()[self._command]}

    def add_arguments_to_parser(self, parser: Any) -> None:
        for name, meaning in SWITCHES.items():
            parser.add_argument(f"--{name}", type=bool, default=True, help=meaning)

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse `args` without LightningCLI's warning that the program has arguments, too."""
        with explain_failures():
            self.config = parser.parse_args(args)
        options = self.config[self.config.subcommand]
        if not isinstance(options.trainer, Namespace):
            received = f"received {cut(options.trainer)}"
            raise InputError(f"trainer holds options, such as {{max_epochs: 3}}, {received}.")
        seed = options.get("seed_everything")
        if type(seed) is int and not 0 <= seed < 2**32:
            raise InputError(f"seed_everything must be between 0 and {2**32 - 1}, got {seed}.")
        check_numbers(options)
        devices, most = str(options.trainer.get("devices")), max(MOST_DEVICES, os.cpu_count() or 1)
        if devices.isdecimal() and int(devices) > most:
            raise InputError(f"trainer.devices is at most {most} on this machine, got {devices}.")
        if "://" in str(options.get("ckpt_path")):
            if options.weights_only is False:
                raise InputError("--weights_only false: download the checkpoint before, if at all.")
            options.weights_only = True  # Lightning would unpickle what an address holds

    def _parse_ckpt_path(self) -> None:
        """Let no `hyper_parameters` of a checkpoint overwrite options, as Lightning 2.6 does."""

    def before_instantiate_classes(self) -> None:
        """Decide where the run is kept: only a fit makes a folder, and always a new one."""
        set_fast(self.config[self.subcommand])
        trainer = self.config[self.subcommand].trainer
        if self.subcommand != "fit":
            self.save_config_callback = None
            if not self._logger_is_given:
                trainer.logger = False
        elif trainer.logger is False:
            trainer.default_root_dir = trainer.default_root_dir or str(new_version(self._run_name))
        elif trainer.logger in (True, None):
            trainer.logger = dict_to_namespace(default_logger(self._run_name))

    def instantiate_classes(self) -> None:
        with explain_failures():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return the Trainer, with the last checkpoint kept and the time measured."""
        options = self.config_init[self.subcommand].trainer
        self.trainer_defaults["callbacks"] = [self._watch, *standard_callbacks(options)]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:
            raise InputError(f"trainer: {error}") from error
        if copies := copying_strategy(trainer):
            raise InputError(f"trainer.strategy: {copies} trains copies of the callbacks; use ddp.")
        nodes, place = trainer.num_nodes, getattr(trainer.strategy, "cluster_environment", None)
        if nodes > 1 and type(place) is LightningEnvironment and "MASTER_ADDR" not in os.environ:
            raise InputError(
                f"trainer.num_nodes is {nodes}, and nothing says where the others are: start all "
                "by torchrun or SLURM, or set MASTER_ADDR, MASTER_PORT and NODE_RANK."
            )
        replace_torch_io(trainer.strategy, checkpoints.AtomicCheckpointIO())
        if type(trainer.strategy).save_checkpoint is not Strategy.save_checkpoint:
            checkpoints.replace_whole(trainer.strategy)
        self._watch.keeps_freed_memory = self.config_init[self.subcommand].keep_freed_memory
        if options.precision in HALF and trainer.precision == "bf16-mixed":
            run_report.print_notice(
                "there is no GPU for 16-mixed; bf16-mixed runs instead (--trainer.precision 32-true"
                " for full precision)."
            )
        return trainer

    def fit(self, model: LightningModule, **kwargs: Any) -> None:
        """Train, and report; after Ctrl-C or SIGTERM say how to resume."""
        made: list[Path] = []
        folder = self._make_folder(made) if self.trainer.is_global_zero else None
        if folder:
            self._began = time_written(folder)
        self._watch.folder = folder
        check_restarts()
        earlier = kwargs.get("ckpt_path")
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        options = self.config_init[self.subcommand]
        is_trial = options.trainer.fast_dev_run or "CI" in os.environ
        for swap in (c for c in callbacks if isinstance(c, NormSwap | WeightNormSwap)):
            swap.builds_kernels = options.build_kernels and not is_trial
        if not any(isinstance(c, checkpoints.ExactResume) for c in callbacks):
            callbacks.insert(0, checkpoints.ExactResume())
        callbacks[:0] = [SameStart(earlier), self._end]
        try:
            with (
                explain_failures(lambda: not self._watch.epochs),
                failing_together(self.trainer, lambda: self._last_checkpoint() or earlier),
            ):
                self.trainer.fit(model, **kwargs)
        except BaseException as error:
            is_start = self._watch.steps < 2 or (input_error_in(error) and self._watch.epochs < 2)
            if is_start and not self._last_checkpoint():
                remove_made(made)
            is_interrupted = isinstance(error, SystemExit) and is_ctrl_c(error)
            is_terminated = isinstance(error, SIGTERMException) or self.trainer.received_sigterm
            if not (is_interrupted or is_terminated):
                raise
            run_report.print_interruption(folder, self._last_checkpoint() or earlier)
            raise SystemExit(INTERRUPTED if is_interrupted else TERMINATED) from None
        run_report.print_fit(self.trainer, self._watch, folder, self._last_checkpoint())
        self._check_losses()

    def validate(self, model: LightningModule, **kwargs: Any) -> None:
        self._evaluate(self.trainer.validate, model, kwargs)

    def test(self, model: LightningModule, **kwargs: Any) -> None:
        self._evaluate(self.trainer.test, model, kwargs)

    def predict(self, model: LightningModule, **kwargs: Any) -> None:
        """Hand the predictions to the writers among the callbacks."""
        self._evaluate(self.trainer.predict, model, kwargs)
        callbacks = given_callbacks(self.config_init[self.subcommand].trainer)
        if not any(isinstance(callback, BasePredictionWriter) for callback in callbacks):
            run_report.print_notice("nothing is kept: add a BasePredictionWriter to the callbacks.")

    def _evaluate(self, measure: Any, model: LightningModule, kwargs: dict[str, Any]) -> None:
        if not kwargs.get("ckpt_path"):
            run_report.print_notice("no --ckpt_path is given; these weights are untrained.")
        if "verbose" in kwargs:
            kwargs["verbose"] = False  # our table says the same
        with explain_failures(), failing_together(self.trainer, lambda: kwargs.get("ckpt_path")):
            measure(model, **kwargs)
        run_report.print_metrics(self.trainer.callback_metrics)
        run_report.print_paths(checkpoint=kwargs.get("ckpt_path"))
        self._check_losses()

    def _check_losses(self) -> None:
        """Exit with DIVERGED, and say so, if a loss ended as NaN or infinity."""
        metrics = self.trainer.callback_metrics.items()
        losses = {k: x for k, x in metrics if "loss" in k.lower() and not k.endswith("_step")}
        ended = {"the loss of the last batch": self._watch.last_loss, **losses}
        bad = [f"{name} is {float(x)}" for name, x in ended.items() if not math.isfinite(x)]
        if bad:
            run_report.print_notice(
                f"{bad[-1]} at the end: the weights are of no use; lower the learning rate, "
                f"{larger_eps(self.trainer.optimizers)}clip the gradients, or look for the first "
                "value that is not finite."
            )
            raise SystemExit(DIVERGED)

    def _make_folder(self, made: list[Path]) -> Path | None:
        """Make the run's folder, or raise InputError; `made` gets all made for it, inner first."""
        options = self.config_init[self.subcommand].trainer
        if options.fast_dev_run or not self.trainer.log_dir:
            return None
        folder = Path(self.trainer.log_dir)
        if (folder / "config.yaml").exists():
            raise InputError(f"{folder} holds another run; leave trainer.logger.version out.")
        try:
            made += [place for place in (folder, *folder.parents) if not place.exists()]
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"the run's folder cannot be made: {error}.") from error
        return folder

    def _last_checkpoint(self) -> Path | None:
        """Return the last one that this run has written: a resume takes over names of earlier."""
        callbacks = [c for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        paths = [Path(path) for c in callbacks for path in (c.last_model_path, c.best_model_path)]
        paths.append(self._end.file or Path())
        written = [path for path in paths if path.name and path.exists()]
        written = [path for path in written if time_written(path) >= self._began]
        return max(written, key=time_written, default=None)


def set_fast(options: Namespace) -> None:
    """Set what is fast on this CPU, where the model's `fast` asks for it, and say what."""
    settings = options.model.get("init_args", {})
    if settings.get("fast") is None:
        return
    trainer, kind = options.trainer, options.trainer.accelerator
    gpu = torch.accelerator.is_available() if kind == "auto" else kind != "cpu"
    if gpu or not has_bfloat16():
        why = "this is no fit on a CPU" if gpu else "this CPU has no instructions for bfloat16"
        run_report.print_notice(f"model.fast changes nothing: {why}.")
        return
    if trainer.precision in (None, *HALF):
        trainer.precision = "bf16-mixed"
    settings.channels_last = True
    chosen = ["channels_last", str(trainer.precision)]
    swaps: list[Any] = given_callbacks(trainer)
    quantised = any(swap.class_path.endswith(".Int8Swap") for swap in swaps)  # never fused
    for swap in swaps:
        given = swap.get("init_args", {})
        if swap.class_path.endswith(".NormSwap") and not given.fuse and not quantised:
            with suppress(InputError):  # of norms that cannot be fused
                given.fuse = check_fuse("add_relu", given.norm, given.kinds)
                chosen.append("norms with additions and ReLU")
    run_report.print_notice(f"model.fast: {', '.join(chosen)}.")


def has_bfloat16() -> bool:
    """Return whether the CPU computes with bfloat16; without, it is slower than float32."""
    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.11
        return torch.cpu._is_avx512_bf16_supported()
    known = torch.cpu.get_capabilities()
    return any(known.get(name) for name in ("bf16", "avx512_bf16"))


def standard_callbacks(options: Namespace) -> list[Callback]:
    """Return what the Trainer's `options` leave open: the progress bar and the last checkpoint."""
    given = given_callbacks(options)
    added: list[Callback] = [SoundNumerics()]
    if not options.barebones:
        added.append(run_report.SkippedStepCount())
    if not (any(isinstance(c, ProgressBar) for c in given) or _off(options, "progress_bar")):
        added.append(run_report.MetricsBar())
    if not (any(_keeps_last(c) for c in given) or _off(options, "checkpointing")):
        # One file that each epoch replaces; save_last would write everything twice.
        names: dict[str, Any] = {"filename": "last", "enable_version_counter": False}
        ours = [ModelCheckpoint(**names, mode=m, save_on_train_epoch_end=True) for m in ORDERS]
        taken = {c.state_key for c in given}  # Lightning refuses two; without a metric both do
        added.append(next((c for c in ours if c.state_key not in taken), ours[0]))
    return added


def given_callbacks(options: Namespace) -> list[Callback]:
    """Return the callbacks in the Trainer's `options`, where one need not be in a list."""
    callbacks = options.callbacks or []
    return callbacks if isinstance(callbacks, list) else [callbacks]


def _off(options: Namespace, what: str) -> bool:
    return options[f"enable_{what}"] is False or options.barebones


def _keeps_last(callback: Callback) -> bool:
    """Return whether a callback regularly writes all that a resume needs."""
    if not isinstance(callback, ModelCheckpoint) or callback.save_weights_only:
        return False
    keeps_some, by_epochs = callback.save_top_k != 0, callback.every_n_epochs
    by_steps = callback._every_n_train_steps or callback._train_time_interval
    if callback.save_last:  # which follows another that is written, but for steps and times
        return bool(by_steps or (by_epochs and keeps_some))
    return bool(callback.monitor is None and keeps_some and (by_steps or by_epochs))


def is_ctrl_c(stop: SystemExit) -> bool:
    """Return True if `stop` is what Lightning 2.6 makes of KeyboardInterrupt: exit(1)."""
    return isinstance(stop.__context__, KeyboardInterrupt)


class SameStart(Callback):
    """Refuses a fit whose processes find other checkpoints, each on its own file system."""

    __repr__ = repr_by_arguments

    def __init__(self, checkpoint: str | None) -> None:
        self.checkpoint = checkpoint

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        found: list[str | None] = [None] * trainer.world_size
        if dist.is_initialized():
            dist.all_gather_object(found, self.checkpoint and str(self.checkpoint))
        if len(set(found)) > 1:
            other = next(rank for rank, path in enumerate(found) if path != found[0])
            raise InputError(
                f"--ckpt_path: rank 0 starts from {found[0]}, rank {other} from {found[other]}: "
                "let all nodes share the folder of the runs, or give the path of a checkpoint."
            )


def check_restarts() -> None:
    """Notice, before it is needed, that torchrun cannot restart these processes."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        run_report.print_notice(
            f"torchrun's --max-restarts {restarts} cannot replace lost processes, since new ones "
            "find the addresses of the old (https://github.com/pytorch/pytorch/issues/135712)"
            ": set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1."
        )
