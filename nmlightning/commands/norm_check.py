"""Who computes which norm on a device, whether it computes what the formula does, and how fast."""

import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nmlightning.norms import (
    L1BatchNorm2d,
    L1LayerNorm,
    L1RMSNorm,
    LInfBatchNorm2d,
    LpBatchNorm2d,
    RangeBatchNorm2d,
    TopKBatchNorm2d,
)
from nmlightning.norms.batch_norm_base import BatchNormBase
from nmlightning.norms.kernels.job import Fused
from nmlightning.norms.self_check import TOLERANCES, disagreement, exact_input, time_ratios
from nmlightning.norms.serving import choice_for

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDTH = 64
CHECKED, TIMED = (
    {4: (16, WIDTH, 8, 16), 2: (128, WIDTH)},
    {4: (32, WIDTH, 28, 28), 2: (4096, 256)},
)
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
ROUNDS = 12


class Subject(NamedTuple):
    """A norm that is checked: torch's of the same kind, the dimensions of its input."""

    name: str
    make: Callable[[int], nn.Module]
    torchs: type[nn.Module] = nn.BatchNorm2d
    dims: int = 4
    timed: bool = True


def _fused(norm: type[BatchNormBase], fused: Fused) -> Callable[[int], nn.Module]:
    """Return what makes a norm that does the ReLU, or the addition and the ReLU, behind it."""

    def make(width: int) -> nn.Module:
        layer = norm(width)
        layer.fused = fused
        return layer

    return make


SUBJECTS = (
    Subject("L1 batch norm", L1BatchNorm2d),
    Subject("L1 and ReLU", _fused(L1BatchNorm2d, "relu"), timed=False),
    Subject("L1, addition and ReLU", _fused(L1BatchNorm2d, "add_relu"), timed=False),
    Subject("L∞ batch norm", LInfBatchNorm2d),
    Subject("Top(10) batch norm", TopKBatchNorm2d),
    Subject("Lp batch norm, p = 3", lambda width: LpBatchNorm2d(width, p=3.0), timed=False),
    Subject("range batch norm", RangeBatchNorm2d, timed=False),
    Subject("L1 layer norm", L1LayerNorm, nn.LayerNorm, 2),
    Subject("L1 RMS norm", L1RMSNorm, nn.RMSNorm, 2),
)


Answer = tuple[str, str]
"""A backend, and the reason why it is that."""


class Serving(NamedTuple):
    """The backend of each norm in each of `DTYPES`, with a mark, and the reason of each mark."""

    cells: Mapping[str, list[str]]
    reasons: Mapping[str, str]


class Check(NamedTuple):
    """How far a norm is from its formula in float64, as a share of the largest value."""

    subject: str
    backend: str
    dtype: torch.dtype
    layout: str
    error: float

    @property
    def failed(self) -> bool:
        """Whether it is further than the dtype's rounding explains, or not a number."""
        return not self.error <= TOLERANCES[self.dtype]


def describe_serving(device: str) -> Serving:
    """Return who computes each norm on a type of device, and why where it is the formula."""
    marks: dict[str, str] = {}
    cells = {
        subject.name: [_describe(_choices(subject, dtype, device), marks) for dtype in DTYPES]
        for subject in SUBJECTS
    }
    return Serving(cells, {mark: reason for reason, mark in marks.items()})


def check_norms(device: str) -> Iterator[Check]:
    """Yield a check for each norm, dtype and layout."""
    for subject in SUBJECTS:
        for dtype in TOLERANCES:
            for layout, x in _inputs(subject, dtype, device):
                layer = subject.make(WIDTH).to(device)
                backend = choice_for(layer, x).backend
                yield Check(subject.name, backend, dtype, layout, disagreement(layer, x))


def time_norms(device: str) -> Iterator[tuple[Subject, float, float, float]]:
    """Yield each norm that has kernels, and the quartiles of its time against torch's norm."""
    for subject in (subject for subject in SUBJECTS if subject.timed):
        x = torch.randn(TIMED[subject.dims], device=device)
        layer, torchs = (make(x.shape[1]).to(device) for make in (subject.make, subject.torchs))
        low, middle, high = _quartiles(time_ratios(layer, torchs, x, ROUNDS))
        yield subject, low, middle, high


def _inputs(subject: Subject, dtype: torch.dtype, device: str) -> Iterator[tuple[str, Tensor]]:
    x = exact_input(CHECKED[subject.dims], dtype, device)
    if subject.dims == 2:
        yield "", x
    else:
        for layout, memory_format in LAYOUTS.items():
            yield layout, x.contiguous(memory_format=memory_format)


def _choices(subject: Subject, dtype: torch.dtype, device: str) -> dict[Answer, list[str]]:
    """Return the layouts by the backend that is chosen for them and the reason."""
    choices: dict[Answer, list[str]] = {}
    for layout, x in _inputs(subject, dtype, device):
        choice = choice_for(subject.make(WIDTH), x)
        choices.setdefault((choice.backend, choice.reason), []).append(layout)
    return choices


def _describe(choices: Mapping[Answer, list[str]], marks: dict[str, str]) -> str:
    """Return the backends, with the layouts where these differ, and a mark for each reason."""
    words = []
    for (backend, reason), layouts in choices.items():
        mark = marks.setdefault(reason, str(len(marks) + 1)) if reason else ""
        where = f" ({', '.join(layouts)})" if len(choices) > 1 else ""
        words.append(f"{backend}{_raised(mark)}{where}")
    return ", ".join(words)


def _raised(mark: str) -> str:
    return mark.translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _quartiles(ratios: list[float]) -> list[float]:
    return statistics.quantiles(ratios, n=4, method="inclusive")
