"""The settings that every norm layer shares: what is allowed, and how they print."""

import inspect
import math

import torch
from torch import nn

from nmlightning.errors import InputError, is_number, nearest
from nmlightning.norms.accumulation import is_half

STATS_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def check_eps(eps: float) -> float:
    """Return eps if it is finite and at least 0, or raise InputError."""
    if not (is_number(eps) and 0 <= eps < math.inf):
        raise InputError(f"eps must be finite and at least 0, got {eps!r}.")
    return float(eps)


def check_momentum(momentum: float | None) -> float | None:
    """Return the momentum if it is None or within 0 … 1, or raise InputError."""
    if momentum is None or (is_number(momentum) and 0 <= momentum <= 1):
        return momentum
    raise InputError(f"momentum must be between 0 and 1, or None, got {momentum!r}.")


def check_stats_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype, which may be given by its name as in YAML, or raise InputError."""
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in STATS_DTYPES:
        raise InputError(
            f"stats_dtype is None or one of {', '.join(STATS_DTYPES)}, got {name!r}."
            f"{nearest(name, STATS_DTYPES)}"
        )
    return STATS_DTYPES[name]


def accumulation_dtype(input_dtype: torch.dtype, stats_dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype that statistics accumulate in: at least float32, at least the input's.

    Unless a half one is asked for, in which all is then computed. InputError for an input of whole
    or complex numbers, which no norm here is defined for.
    """
    if not input_dtype.is_floating_point:
        raise InputError(f"expected an input of real floating-point numbers, got {input_dtype}.")
    if stats_dtype is not None and is_half(stats_dtype):
        return stats_dtype
    return torch.promote_types(input_dtype, stats_dtype or torch.float32)


def describe_settings(layer: nn.Module, shape: str) -> str:
    """Return `shape` and the layer's other arguments that differ from their defaults."""
    arguments = list(inspect.signature(type(layer).__init__).parameters.values())[2:]
    settings = [shape]
    for argument in arguments:
        value = _setting(layer, argument.name, argument.default)
        if value != argument.default:
            settings.append(f"{argument.name}={value!r}")
    return ", ".join(settings)


def _setting(layer: nn.Module, name: str, default: object) -> object:
    if name == "bias":  # A flag of the constructor, a parameter of the layer.
        return layer.bias is not None or getattr(layer, "weight", None) is None
    return getattr(layer, name, default)
