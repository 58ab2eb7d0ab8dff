"""Who computes a norm: the one place where that is decided, and where its reason is told.

Traced code (`torch.compile`, `torch.export`) always takes the formula, which the compiler fuses
with its neighbours. Eager code takes the kernels of the input's device, if they serve the case.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nmlightning.errors import InputError
from nmlightning.functional.statistics import Statistic
from nmlightning.kernels.cpu.backend import CpuBackend
from nmlightning.kernels.interface import Layout, layout_of
from nmlightning.kernels.triton.backend import TritonBackend

Kind = Literal["batch", "layer", "rms"]
FORMULA = "formula"


class Case(NamedTuple):
    """All that the choice depends on."""

    kind: Kind
    statistic: Statistic
    device: str
    dtype: torch.dtype
    stats_dtype: torch.dtype
    layout: Layout


class Choice(NamedTuple):
    """The backend's name, why it is that, and its kernels; none for the formula."""

    backend: str
    reason: str
    kernels: Any = None


Tracking = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, float], None]
"""Given running mean and variance, the count of batches, the batch's mean and variance, momentum:
moves, in channels where both are finite, each running value that stays so, and counts the batch."""


class Backend(Protocol):
    """Kernels for one type of device."""

    @property
    def name(self) -> str:
        """Such as "C++" or "Triton"."""

    @property
    def device(self) -> str:
        """The type of device that it is for."""

    def refusal(self, case: Case) -> str:
        """Return why it does not serve the case, in a few words; nothing if it does."""

    def kernels(self, case: Case) -> Any:
        """Return the kernels of a case that is served."""

    def tracking(self) -> Tracking | None:
        """Return what moves running statistics, or None where torch's own operations do."""


BACKENDS: tuple[Backend, ...] = (CpuBackend(), TritonBackend())

_asked_for: ContextVar[str] = ContextVar("norm_backend", default="auto")


@contextmanager
def norm_backend(name: Literal["auto", "formula"]) -> Iterator[None]:
    """Within it, forward passes take the kernels where they serve ("auto"), or the formula.

    Backward passes take what the forward pass took.

    Example:
        >>> layer = nmlightning.norms.L1BatchNorm2d(8)
        >>> with norm_backend("formula"):
        ...     y = layer(torch.randn(4, 8, 5, 5))
    """
    if name not in ("auto", FORMULA):
        raise InputError(f"norm_backend is 'auto' or 'formula', got {name!r}.")
    token = _asked_for.set(name)
    try:
        yield
    finally:
        _asked_for.reset(token)


def case_of(
    x: Tensor,
    kind: Kind,
    statistic: Statistic,
    stats_dtype: torch.dtype,
) -> Case:
    """Return the case that an input is."""
    return Case(kind, statistic, x.device.type, x.dtype, stats_dtype, layout_of(x))


def choose_for(
    x: Tensor,
    kind: Kind,
    statistic: Statistic,
    stats_dtype: torch.dtype,
) -> Choice:
    """Return who computes the norm of an input, now."""
    if torch.compiler.is_compiling():
        return _COMPILING
    if type(x) not in _PLAIN:
        return _SUBCLASS
    return choose(case_of(x, kind, statistic, stats_dtype))


def choose(case: Case) -> Choice:
    """Return who computes a case in eager mode, and why."""
    return _choose(case, _asked_for.get())


def choose_tracking(running: Sequence[Tensor], values: Tensor) -> Tracking | None:
    """Return the kernel that moves running statistics towards such values, now, if there is one."""
    if torch.compiler.is_compiling() or values.dtype != torch.float32:
        return None
    if not all(type(r) in _PLAIN and r.dtype == torch.float32 for r in running):
        return None
    return _choose_tracking(values.device.type, _asked_for.get())


def forget_choices() -> None:
    """Choose anew, since kernels have been built or loaded in this process."""
    _choose.cache_clear()
    _choose_tracking.cache_clear()


@lru_cache(maxsize=64)
def _choose_tracking(device: str, asked_for: str) -> Tracking | None:
    if asked_for == FORMULA:
        return None
    return next((backend.tracking() for backend in BACKENDS if backend.device == device), None)


@lru_cache(maxsize=1024)
def _choose(case: Case, asked_for: str) -> Choice:
    if asked_for == FORMULA:
        return Choice(FORMULA, "asked for")
    for backend in BACKENDS:
        if backend.device == case.device:
            refusal = backend.refusal(case)
            if refusal:
                return Choice(FORMULA, refusal)
            return Choice(backend.name, "", backend.kernels(case))
    return Choice(FORMULA, f"no kernels for {case.device}")


_COMPILING = Choice(FORMULA, "traced code")
_SUBCLASS = Choice(FORMULA, "no plain tensor")
_PLAIN = (Tensor, nn.Parameter)
