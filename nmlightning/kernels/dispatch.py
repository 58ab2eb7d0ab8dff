"""Selects the backend of a norm, with the reason where that is the formula.

Traced code (`torch.compile`, `torch.export`) always takes the formula, which the compiler fuses
with its neighbours. Eager code takes the kernels of the input's device where they support the norm.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from nmlightning.errors import InputError
from nmlightning.functional.reductions import is_eager
from nmlightning.functional.statistics import Statistic
from nmlightning.kernels import interface
from nmlightning.kernels.cpu.backend import CpuBackend, first_missing
from nmlightning.kernels.triton.backend import TritonBackend

_P = ParamSpec("_P")
_T = TypeVar("_T")
FORMULA = "formula"
NO_KERNELS = interface.Dispatch(FORMULA, "no kernels for this norm")
BACKENDS: tuple[interface.Backend, ...] = (CpuBackend(), TritonBackend())
NOT_EAGER = interface.Dispatch(FORMULA, "traced, transformed, or no plain tensor")
_choices: list[Any] = [first_missing]
_requested: ContextVar[str] = ContextVar("norm_backend", default="auto")


def remember_choice(choose: Callable[_P, _T]) -> Callable[_P, _T]:
    """Call a function once for each arguments, until kernels have been built or loaded."""
    choice = lru_cache(maxsize=1024)(choose)
    _choices.append(choice)
    return choice  # type: ignore[return-value]


@contextmanager
def norm_backend(name: Literal["auto", "formula"]) -> Iterator[None]:
    """Select the backend of forward passes: "auto", kernels if there are any, or "formula".

    A backward pass uses the backend of its forward pass.

    Examples:
        >>> layer = nmlightning.norms.L1BatchNorm2d(8)
        >>> with norm_backend("formula"):
        ...     y = layer(torch.randn(4, 8, 5, 5))
    """
    if name not in ("auto", FORMULA):
        raise InputError(f"norm_backend is 'auto' or 'formula', got {name!r}.")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def select_backend_for(
    x: Tensor, kind: interface.NormKind, statistic: Statistic, stats_dtype: torch.dtype
) -> interface.Dispatch:
    """Return the backend that computes the norm of x, now."""
    if not is_eager(x):
        return NOT_EAGER
    key = interface.DispatchKey(
        kind, statistic, x.device.type, x.dtype, stats_dtype, interface.layout_of(x)
    )
    return select_backend(key)


def requested_backend() -> str:
    """Return what `norm_backend` asks for."""
    return _requested.get()


def select_backend(key: interface.DispatchKey) -> interface.Dispatch:
    """Return the backend for a key in eager mode."""
    return _select(key, _requested.get())


def select_batch_norm(
    x: Tensor, statistic: Statistic, stats_dtype: torch.dtype | None
) -> interface.Normalise | None:
    """Return the batch norm of one process by kernels, now, which may leave x to the formula.

    In C++ it sees itself to what x is, to modes and to transforms.
    """
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter):
        return None
    if x.is_cpu:
        return _select_on_cpu(statistic, stats_dtype or torch.float32, _requested.get())
    if not x.is_floating_point():
        return None
    wide = torch.promote_types(x.dtype, stats_dtype or torch.float32)
    return _batch_norm(select_backend_for(x, "batch", statistic, wide), statistic)


def select_tracking(mean: Tensor) -> interface.Tracking | None:
    """Return the kernel that moves running statistics towards such a mean, now, if there is one."""
    return _select_tracking(mean.device.type, _requested.get()) if is_eager(mean) else None


def weight_kernels(device: str = "cpu") -> Any:
    """Return what has `normalise_weights` and `row_norms` of many weights; None: the formula."""
    return _select_weight_kernels(device, _requested.get())


def quantizing_kernels(x: Tensor) -> Any:
    """Return what has `ends`, `quantize`, `convert_elements` and `flip_kernels`, now, or None.

    Each gives None for what it is not for.
    """
    return weight_kernels() if x.is_cpu and is_eager(x) else None


def clear_dispatch_cache() -> None:
    """Select anew, since kernels have been built or loaded in this process."""
    for choice in _choices:
        choice.cache_clear()


@remember_choice
def _select(key: interface.DispatchKey, requested: str) -> interface.Dispatch:
    if requested == FORMULA:
        return interface.Dispatch(FORMULA, "asked for")
    for backend in BACKENDS:
        if backend.device == key.device:
            reason = backend.unsupported_reason(key)
            if reason:
                return interface.Dispatch(FORMULA, reason)
            return interface.Dispatch(backend.name, "", backend.kernels(key))
    return interface.Dispatch(FORMULA, f"no kernels for {key.device}")


@remember_choice
def _select_weight_kernels(device: str, requested: str) -> Any:
    if requested == FORMULA:
        return None
    return next((backend.weights() for backend in BACKENDS if backend.device == device), None)


@remember_choice
def _select_on_cpu(
    statistic: Statistic, stats_dtype: torch.dtype, requested: str
) -> interface.Normalise | None:
    key = interface.DispatchKey("batch", statistic, "cpu", torch.float32, stats_dtype, "NCHW")
    return _batch_norm(_select(key, requested), statistic)


def _batch_norm(chosen: interface.Dispatch, statistic: Statistic) -> interface.Normalise | None:
    return chosen.kernels.batch_norm(statistic) if chosen.kernels else None


@remember_choice
def _select_tracking(device: str, requested: str) -> interface.Tracking | None:
    if requested == FORMULA:
        return None
    return next((backend.tracking() for backend in BACKENDS if backend.device == device), None)
