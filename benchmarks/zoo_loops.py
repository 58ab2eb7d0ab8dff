"""Fits with Lightning's flags, callbacks and strategies, and in other loops: same bits as by hand?

    python benchmarks/zoo_loops.py [--rows zoo_loops.jsonl] [--only 'flag/precision*']
    python benchmarks/zoo_loops.py --write docs/compatibility.md    # the tables

Each is run with this package's callbacks, and with what they do done by hand in the module.
"""

import io
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import callbacks as cb
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from zoo import Row, first_words, sweep
from zoo_fits import LOOPS, Case, Run, Sharded, fit, fit_synced
from zoo_tables import write_loops

from nmlightning.errors import InputError
from nmlightning.weights.channel_norms import local_part

PARTS = ("norms, steered", "norms, weights")  # what is changed: which callbacks are there

# Each alone: the name is the flag's, and what tells it from others of the flag.
VALUES: Mapping[str, Any] = {
    "accumulate_grad_batches": 2, "accumulate_grad_batches=3 (a rest)": 3,
    "gradient_clip_val": 0.1, "deterministic": True, "deterministic=warn": "warn",
    "benchmark": True, "detect_anomaly": True, "inference_mode=False": False,
    "overfit_batches": 2, "fast_dev_run": True, "fast_dev_run=3": 3, "barebones": True,
    "val_check_interval": 2, "val_check_interval=0.25": 0.25, "check_val_every_n_epoch": 2,
    "limit_train_batches": 3, "limit_train_batches=0.5": 0.5, "limit_train_batches=0": 0,
    "limit_val_batches=0": 0, "limit_test_batches": 1, "limit_predict_batches": 1,
    "max_time": "00:00:10:00", "max_steps": 5, "max_epochs=0": 0, "num_sanity_val_steps=-1": -1,
    "num_sanity_val_steps=0": 0, "reload_dataloaders_every_n_epochs": 1,
    "use_distributed_sampler=False": False, "enable_checkpointing=False": False,
    "enable_model_summary": True, "enable_progress_bar": True, "log_every_n_steps=1": 1,
    "enable_autolog_hparams=False": False, "logger=False": False, "devices=auto": "auto",
    "plugins=async checkpoints": "async checkpoints",
    **{f"profiler={p}": p for p in ("simple", "advanced", "pytorch")},
    **{f"precision={p}": p for p in (
        "64-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "transformer-engine")},
}  # fmt: skip
FLAGS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    **{name: {name.partition("=")[0]: value} for name, value in VALUES.items()},
    "gradient_clip_algorithm=value": {
        "gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "check_val_every_n_epoch=None": {"check_val_every_n_epoch": None, "val_check_interval": 3},
    "min_epochs, min_steps": {"min_epochs": 1, "min_steps": 3},
}  # fmt: skip


def fit_by(flags: Mapping[str, Any], run: Run) -> nn.Module:
    options = dict(flags)
    if options.get("plugins") == "async checkpoints":
        options["plugins"] = [pl.plugins.io.AsyncCheckpointIO()]
    return fit(run, **options)


def loggers() -> dict[str, Case]:
    """Each logger that is installed."""
    makers = {
        "TensorBoardLogger": lambda f: pl.loggers.TensorBoardLogger(f),
        "CSVLogger": lambda f: pl.loggers.CSVLogger(f),
        "several": lambda f: [pl.loggers.CSVLogger(f), pl.loggers.TensorBoardLogger(f)],
    }
    return {
        f"logger={name}": lambda run, make=make: fit(run, logger=make(run.folder))
        for name, make in makers.items()
    }


PLAIN = ("EMAWeightAveraging", "LearningRateMonitor", "RichModelSummary", "RichProgressBar",
         "TQDMProgressBar", "WeightAveraging")  # fmt: skip
CALLBACKS: Mapping[str, Callable[[], Any]] = {
    **{name: getattr(cb, name) for name in PLAIN},
    "BackboneFinetuning": lambda: cb.BackboneFinetuning(1, verbose=False),
    "BatchSizeFinder": lambda: cb.BatchSizeFinder(steps_per_trial=1, max_trials=1),
    "DeviceStatsMonitor": lambda: cb.DeviceStatsMonitor(cpu_stats=True),
    "EarlyStopping": lambda: cb.EarlyStopping("val_loss", patience=0),
    "GradientAccumulationScheduler": lambda: cb.GradientAccumulationScheduler({0: 1, 1: 2}),
    "LambdaCallback": lambda: cb.LambdaCallback(on_fit_start=lambda *_: None),
    "LearningRateFinder": lambda: cb.LearningRateFinder(num_training_steps=8),
    "ModelCheckpoint": lambda: cb.ModelCheckpoint(monitor="val_loss", every_n_train_steps=2),
    "ModelPruning": lambda: cb.ModelPruning("l1_unstructured", amount=0.3),
    "ModelPruning (norms)": lambda: cb.ModelPruning(
        "random_unstructured", parameter_names=["weight", "bias"], amount=0.3
    ),
    "ModelSummary": lambda: cb.ModelSummary(-1),
    "OnExceptionCheckpoint": lambda: cb.OnExceptionCheckpoint(tempfile.gettempdir()),
    "SpikeDetection": lambda: cb.SpikeDetection(warmup=1),
    "StochasticWeightAveraging": lambda: cb.StochasticWeightAveraging(1e-2, swa_epoch_start=1),
    "ThroughputMonitor": lambda: cb.ThroughputMonitor(lambda batch: len(batch[0])),
    "Timer": lambda: cb.Timer("00:00:10:00"),
}
BASES = ("BaseFinetuning", "BasePredictionWriter", "Callback", "Checkpoint", "ProgressBar")


def fit_with(make: Callable[[], Any], first: bool, run: Run) -> nn.Module:
    callback = make()
    shows = isinstance(callback, cb.ProgressBar)
    return fit(run, callback, first=first, enable_progress_bar=shows)


STRATEGIES: Mapping[str, Any] = {
    "auto": "auto",
    "ddp": "ddp",
    "ddp_find_unused_parameters_true": "ddp_find_unused_parameters_true",
    "DDPStrategy(gradient_as_bucket_view, static_graph)": lambda: DDPStrategy(
        gradient_as_bucket_view=True, static_graph=True
    ),
    "fsdp": lambda: FSDPStrategy(),
}  # fmt: skip


def shard() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


def fit_on(strategy: Any, run: Run, fit: Callable[..., nn.Module] = fit) -> nn.Module:
    """Fit in two processes, but for "auto"."""
    made = strategy() if callable(strategy) else strategy
    devices = 1 if made == "auto" else 2
    rank = start_ranks() if devices > 1 else 0
    try:
        return fit(run, strategy=made, devices=devices)
    finally:
        if rank:
            os._exit(0)


def start_ranks() -> int:
    """Make this process the first of two, as torchrun would; return the rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank = int(os.fork() == 0)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "zoo",
    }  # fmt: skip
    return rank


def list_cases() -> dict[str, dict[str, list[Case]]]:
    """Return the cases of each group; each is run in several ways."""
    there = set(cb.__all__) - set(BASES) - set(CALLBACKS)
    assert not there, there
    return {
        "flag": {name: [partial(fit_by, flags)] for name, flags in FLAGS.items()}
        | {name: [case] for name, case in loggers().items()}
        | {"sync_batchnorm": [fit_synced]},
        "callback": {
            name: [partial(fit_with, make, first) for first in (False, True)]
            for name, make in CALLBACKS.items()
        },
        "strategy": {name: [partial(fit_on, made)] for name, made in STRATEGIES.items()}
        | {
            "ddp, sync_batchnorm": [partial(fit_on, "ddp", fit=fit_synced)],
            "ModelParallelStrategy": [partial(fit_on, shard, fit=partial(fit, cls=Sharded))],
        },
        "loop": {name: [case] for name, case in LOOPS.items()},
    }


def try_case(group: str, name: str, row: Row) -> None:
    """Put into the row what became of each part, with each way of running the case."""
    for part in PARTS:
        ways = range(len(list_cases()[group][name]))
        found = {outcome_of(part, group, name, way) for way in ways}
        row.setdefault("outcomes", {})[part] = sorted(found)


def outcome_of(*case: Any) -> str:
    """Return "same bits", or in words what was refused or is not as by hand."""
    ours = attempt("callbacks", *case)
    if isinstance(ours, InputError):
        return f"refused: {ours}"
    by_hand = attempt("hand", *case)
    if isinstance(ours, Exception):
        without = attempt("nothing", *case)
        if str(without) == str(ours):
            return f"as without: {without}"
        return f"{'as' if str(ours) == str(by_hand) else 'wrong, not'} by hand: {ours}"
    if isinstance(by_hand, Exception):
        return f"only by callbacks; by hand: {by_hand}"
    differ = [name for name, q in by_hand.items() if not same(q, ours.get(name))]
    if differ or len(ours) != len(by_hand):
        return f"wrong: {len(differ)} of {len(by_hand)} differ, such as {next(iter(differ), '')}"
    return "same bits"


def same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and torch.allclose(one, other, 0, 0, equal_nan=True)


def attempt(*case: Any) -> Any:
    """Return the state of the module after a run, or its error; each of ranks has a process."""
    if "strategy" in case:
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as executor:
            answer = executor.submit(run_once, *case).result()
    else:
        answer = run_once(*case)
    return answer if isinstance(answer, Exception) else torch.load(io.BytesIO(answer))


def run_once(by: str, part: str, group: str, name: str, way: int) -> bytes | Exception:
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(1)
        try:
            state = list_cases()[group][name][way](Run(part, by, folder)).state_dict()
            state = {key: local_part(value) for key, value in state.items()}
        except Exception as error:
            return (
                type(error)(str(error))
                if isinstance(error, InputError)
                else Failure(first_words(error))
            )
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


class Failure(Exception):
    """Another error, in words."""


def warm_up() -> None:
    """Import once, for all processes, what a fit imports."""
    run_once("callbacks", PARTS[1], "flag", "none", 0)


if __name__ == "__main__":
    sweep(list_cases(), try_case, write_loops, "zoo_loops.jsonl", warm_up)
