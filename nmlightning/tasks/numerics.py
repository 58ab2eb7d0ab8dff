"""Keeps the states of metrics out of half precision, in which sums soon stand still."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric


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
