"""Callbacks of tasks that refuse unsound numbers or announce a compilation, and exact metrics."""

import functools
import inspect
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from nmlightning.errors import InputError, repr_by_arguments

_LEAST_EPS = 3e-8  # what is below rounds to 0 in float16, whose smallest number is 2^-24
_LARGEST_HALF = torch.finfo(torch.float16).max


class SoundNumerics(pl.Callback):
    """Refuses settings of optimizers that are not finite, or an eps that is 0 in float16.

    In float16, gradients whose norm would overflow there, and so be clipped to 0, are first clipped
    by their norm in float32. Metrics count in float32 whatever the module's precision.
    """

    __repr__ = repr_by_arguments

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the optimizers, and what the Trainer's precision has made of the metrics."""
        self._lift_metrics(trainer, pl_module)
        for optimizer in trainer.optimizers:
            check_optimizer(optimizer)

    def _lift_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with exact_metrics(pl_module):
            pass

    on_validation_start = on_test_start = _lift_metrics

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Clip what Lightning, which does so next, could not."""
        limit = trainer.gradient_clip_val
        if limit and trainer.gradient_clip_algorithm in (None, "norm"):
            clip_half(optimizer, float(limit))


def check_optimizer(optimizer: Optimizer) -> None:
    """Raise InputError for a setting, but a default, that is not finite, or is 0 in float16."""
    name, defaults = type(optimizer).__name__, inspect.signature(type(optimizer)).parameters
    for group in optimizer.param_groups:
        halves = [p for p in group["params"] if p.dtype == torch.float16]
        for key, value in group.items():
            if key == "params":
                continue
            numbers = value if isinstance(value, list | tuple) else [value]
            sound = all(
                math.isfinite(x) if isinstance(x, float) else bool(x.isfinite().all())
                for x in numbers
                if isinstance(x, float | Tensor)
            )
            if not sound and (key not in defaults or defaults[key].default != value):
                raise InputError(f"optimizer: {key} of {name} is {value}; give a finite number.")
            small = any(isinstance(x, float | int) and x < _LEAST_EPS for x in numbers)
            small = small and name != "Adafactor"  # timm's and Transformers' compute in float32
            if halves and small and re.fullmatch(r"eps\d?", key):
                raise InputError(
                    f"optimizer: {key}={value} of {name} is 0 in float16, as {len(halves)} of its "
                    f"parameters are, and to divide by it gives NaN: give {key}=1e-4, or a "
                    "precision of bf16-true or 16-mixed."
                )


def larger_eps(optimizers: Sequence[Optimizer]) -> str:
    """Return the advice to raise an eps that float16 may lose beside what it is added to, or ""."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            eps = [key for key in group if re.fullmatch(r"eps\d?", key)]
            if eps and any(p.dtype == torch.float16 for p in group["params"]):
                name = type(optimizer).__name__
                return f"raise {eps[0]}={group[eps[0]]} of {name}, which is small in float16, "
    return ""


def clip_half(optimizer: Optimizer, limit: float) -> None:
    """Clip gradients in float16 by their norm, of float32, if it is too large for float16."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    halves = [g for g in gradients if type(g) is Tensor and g.dtype == torch.float16]
    if not halves:
        return
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in halves]
    norm = float(torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms])))
    if _LARGEST_HALF < norm < math.inf:
        torch._foreach_mul_(halves, min(limit, _LARGEST_HALF / 2) / norm)


@contextmanager
def exact_metrics(module: nn.Module) -> Iterator[None]:
    """Let no metric in `module` count in half, whatever the body converts the module to.

    What is float32 or an integer stays so, at its value; states that are in half already, since
    that was torch's default dtype, become float32.
    """
    metrics = [part for part in module.modules() if isinstance(part, Metric)]
    earlier = [(metric.dtype, dict(metric._defaults), metric.metric_state) for metric in metrics]
    yield
    for metric, (dtype, defaults, states) in zip(metrics, earlier, strict=True):
        metric._dtype = _widest(dtype, metric.dtype)
        for name in defaults:
            metric._defaults[name] = _keep(defaults[name], metric._defaults[name])
            setattr(metric, name, _keep(states[name], getattr(metric, name)))


def apply_exactly(
    metric: Metric, fn: Callable[..., Any], exclude_state: Sequence[str] = ""
) -> nn.Module:
    """Convert a metric, as the `_apply` of its class, without its states: see `exact_metrics`."""
    with exact_metrics(metric):
        return Metric._apply(metric, fn, exclude_state)


def exact_zero() -> Tensor:
    """Return a scalar of torch's default dtype, or of float32 where that is half."""
    return torch.zeros((), dtype=_widest(torch.get_default_dtype()))


def _keep(earlier: Any, converted: Any) -> Any:
    if not isinstance(converted, Tensor):
        return [_keep(e, c) for e, c in zip(earlier, converted, strict=True)]
    if not converted.is_floating_point():
        return converted
    dtype = _widest(earlier.dtype, converted.dtype)
    return converted if converted.dtype == dtype else earlier.to(converted.device, dtype)


def _widest(*dtypes: torch.dtype) -> torch.dtype:
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


class CompilationNotice(pl.Callback):
    """Announces the first batch of each stage, in which `torch.compile` works, and its time.

    Training and evaluation are compiled separately, and a sanity check before the first epoch is
    evaluation. The lines begin with the name of the task.
    """

    __repr__ = repr_by_arguments

    def __init__(self, task: str) -> None:
        self.task = task
        self._started: dict[str, float] = {}
        self._finished: set[str] = set()

    def _begin(self, stage: str, *_: Any) -> None:
        if stage not in self._started:
            self._started[stage] = time.perf_counter()
            rank_zero_info(
                f"{self.task}: compiling the network for {stage}: the first step takes a minute or "
                "more."
            )

    def _end(self, stage: str, *_: Any) -> None:
        if stage not in self._finished:
            self._finished.add(stage)
            seconds = time.perf_counter() - self._started[stage]
            step = f"the first step of {stage}, compiled,"
            rank_zero_info(f"{self.task}: {step} took {seconds:.0f} s.")

    on_train_batch_start: Any = functools.partialmethod(_begin, "training")
    on_train_batch_end: Any = functools.partialmethod(_end, "training")
    on_validation_batch_start: Any = functools.partialmethod(_begin, "evaluation")
    on_validation_batch_end: Any = functools.partialmethod(_end, "evaluation")
    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end


def task_callbacks(task: str, compiled: bool) -> list[pl.Callback]:
    """Return what checks the numbers, and announces that the network is compiled if it is to be."""
    return [SoundNumerics(), CompilationNotice(task)] if compiled else [SoundNumerics()]
