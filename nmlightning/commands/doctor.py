"""`nm doctor`: what is installed, which backend computes which layer, and a self-check.

The first thing that a report of a bug holds: plain text, narrow enough to paste. The inputs of the
check are multiples of 1/8 whose number is a power of two, so that their mean is exact in every
dtype, and no deviation of one backend has another sign than the same deviation of another.
"""

import copy
import math
import os
import platform
import random
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import nmlightning
from nmlightning import allocator
from nmlightning.commands.argument_parser import FAILED_CHECK, ArgumentParser, print_words
from nmlightning.int8 import Int8Conv2d, Int8Layer, Int8Linear, describe_backends
from nmlightning.kernels.cpu.build import cache_folder, library_path, unusable_reason
from nmlightning.kernels.dispatch import norm_backend
from nmlightning.kernels.interface import Fused
from nmlightning.norms.batch_norm_base import BatchNormBase
from nmlightning.reports.formatting import Grid, show

Rows = list[tuple[str, str]]

NEEDED = (
    *("torch", "pytorch-lightning", "torchmetrics", "torchvision", "tensorboard"),
    *("jsonargparse", "numpy", "ninja", "rich"),
)
OPTIONAL = (
    *("lightning", "triton", "timm", "litdata", "onnx", "datasets"),
    *("tokenizers", "sacrebleu"),
)


def describe_versions() -> Rows:
    """Return the versions of this package, of Python, and of what it needs or may use."""
    return [
        ("nmlightning", nmlightning.__version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("needs", ", ".join(map(_version, NEEDED))),
        ("may use", ", ".join(map(_version, OPTIONAL))),
    ]


def describe_devices() -> Rows:
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    cpu = f"{_cpu_name()}, {threads}, {torch.backends.cpu.get_cpu_capability()}"
    if not torch.cuda.is_available():
        built = f" (torch is built for CUDA {torch.version.cuda})" if torch.version.cuda else ""
        return [("CPU", cpu), ("GPU", f"none{built}")]
    rows = [("CPU", cpu)]
    for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count())):
        size = f"sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        rows.append(("GPU", f"{gpu.name}, {size}, CUDA {torch.version.cuda}"))
    return rows


def describe_kernels() -> Rows:
    """Return whether the kernels for the CPU are built, and where; and what freed memory does."""
    path = library_path(cache_folder())
    reason = allocator.unsupported_reason()
    memory = f"left to the system: {reason}" if reason else "kept by training on a CPU"
    return [("C++ kernels", unusable_reason(path) or str(path)), ("freed memory", memory)]


def _cpu_name() -> str:
    """Return what the CPU calls itself, as far as the system says."""
    with suppress(OSError):
        named = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text("utf-8"))
        if named:
            return named[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    """Return a package with its version, or a dash where it is not installed."""
    if package == "torch":
        return f"torch {torch.__version__}"  # with what it is built for
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} –"


TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of the largest value of each tensor: some 8 units in the last place of its dtype."""

GRID = 8.0  # steps of 1/8
LIMIT = 3.0  # of |x|: 24 steps, which bfloat16 holds
FAR = 8.0  # from any y, so that what ReLU lets pass does not hang on the rounding of a sum

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDTH = 64
CHECKED = {4: (16, WIDTH, 8, 16), 2: (128, WIDTH)}
TIMED = {4: (32, WIDTH, 28, 28), 2: (4096, 256)}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
ROUNDS = 12

OurNorm = BatchNormBase | nmlightning.LpLayerNorm | nmlightning.LpRMSNorm


class Subject(NamedTuple):
    """A norm that is checked: torch's of the same kind, the dimensions of its input."""

    name: str
    make: Callable[[int], OurNorm]
    torchs: type[nn.Module] = nn.BatchNorm2d
    dims: int = 4
    timed: bool = True


def _make_fused(fused: Fused, width: int) -> BatchNormBase:
    """Return a norm that does the ReLU, or the addition and the ReLU, behind it."""
    layer = nmlightning.L1BatchNorm2d(width)
    layer.fused = fused
    return layer


SUBJECTS = (
    Subject("L1 batch norm", nmlightning.L1BatchNorm2d),
    Subject("L1 and ReLU", partial(_make_fused, "relu"), timed=False),
    Subject("L1, addition and ReLU", partial(_make_fused, "add_relu"), timed=False),
    Subject("L∞ batch norm", nmlightning.LInfBatchNorm2d),
    Subject("Top(10) batch norm", nmlightning.TopKBatchNorm2d),
    Subject("Lp batch norm, p = 3", partial(nmlightning.LpBatchNorm2d, p=3.0), timed=False),
    Subject("range batch norm", nmlightning.RangeBatchNorm2d, timed=False),
    Subject("L1 layer norm", nmlightning.L1LayerNorm, nn.LayerNorm, 2),
    Subject("L1 RMS norm", nmlightning.L1RMSNorm, nn.RMSNorm, 2),
)


class Check(NamedTuple):
    """The distance of a norm from its formula in float64, as a share of the largest value."""

    subject: str
    backend: str
    dtype: torch.dtype
    layout: str
    error: float

    @property
    def failed(self) -> bool:
        """True if it is further than the dtype's rounding explains, or not a number."""
        return not self.error <= TOLERANCES[self.dtype]


def check_norms(device: str) -> Iterator[Check]:
    for subject in SUBJECTS:
        for dtype in TOLERANCES:
            for layout, x in _inputs(subject, dtype, device):
                layer = subject.make(WIDTH).to(device)
                backend = layer.backend_for(x).backend
                yield Check(subject.name, backend, dtype, layout, disagreement(layer, x))


def _inputs(subject: Subject, dtype: torch.dtype, device: str) -> Iterator[tuple[str, Tensor]]:
    x = exact_input(CHECKED[subject.dims], dtype, device)
    if subject.dims == 2:
        yield "", x
    else:
        for layout, memory_format in LAYOUTS.items():
            yield layout, x.contiguous(memory_format=memory_format)


def _describe_backends(
    subject: Subject, dtype: torch.dtype, device: str, marks: dict[str, str]
) -> str:
    """Return the backends, with the layouts where these differ, and a mark for each reason."""
    choices: dict[tuple[str, str], list[str]] = defaultdict(list)
    for layout, x in _inputs(subject, dtype, device):
        dispatch = subject.make(WIDTH).backend_for(x)
        choices[dispatch.backend, dispatch.reason].append(layout)
    words = []
    for (backend, reason), layouts in choices.items():
        where = f" ({', '.join(layouts)})" if len(choices) > 1 else ""
        words.append(_mark(backend, reason, marks) + where)
    return ", ".join(words)


def _mark(backend: str, reason: str, marks: dict[str, str]) -> str:
    """Return a backend with the mark of the reason for it, if there is one."""
    mark = marks.setdefault(reason, str(len(marks) + 1)) if reason else ""
    return backend + mark.translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def make_int8_layers(device: str) -> dict[str, Int8Layer]:
    """Return layers in int8 that round to nearest, by what they are called here."""
    conv = partial(Int8Conv2d, WIDTH, WIDTH, device=device, rounding="nearest")
    return {
        "conv": conv(3, padding=1),
        "strided conv": conv(3, stride=2, padding=1),
        "1×1 conv": conv(1),
        "depthwise conv": conv(3, padding=1, groups=WIDTH),
        "linear": Int8Linear(WIDTH, WIDTH, device=device, rounding="nearest"),
    }


def check_int8(device: str) -> Iterator[Check]:
    """Yield the distance of each layer in int8 from the formula, NaN where integers differ."""
    for name, layer in make_int8_layers(device).items():
        x = exact_input(CHECKED[layer.weight.dim()], torch.float32, device)
        grad = exact_input(layer(x).shape, x.dtype, device, seed=1)
        integers, found = _run_int8(layer, x, grad)
        with norm_backend("formula"):
            right, expected = _run_int8(layer, x, grad)
        same = all(map(torch.equal, integers, right))
        error = _distance(found, expected) if same else math.nan
        yield Check(name, layer.backend_for(x).backend, x.dtype, "", error)


def _run_int8(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the integers that a layer keeps for backward, and its results."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.extend([] if tensor.is_floating_point() else [tensor])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        results = _results(layer, x, grad)
    return kept, results


def exact_input(shape: Sequence[int], dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Return values of about a Gaussian's whose sums are exact, of a seed's."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (values.clamp(-LIMIT, LIMIT) * GRID).round().div(GRID).to(device, dtype)


def disagreement(layer: nn.Module, x: Tensor) -> float:
    """Return how far output and gradients are from the formula's in float64.

    Returns:
        The largest over y, dx and the gradients of the parameters of max |a − b| / max |b|.
    """
    grad = exact_input(x.shape, x.dtype, str(x.device), seed=1)
    found = _results(copy.deepcopy(layer), x, grad)
    with norm_backend("formula"):
        expected = _results(copy.deepcopy(layer).double(), x.double(), grad.double())
    return _distance(found, expected)


def _distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def time_ratios(layer: nn.Module, reference: nn.Module, x: Tensor, rounds: int) -> list[float]:
    """Return the time of a layer's forward and backward over another's, in each round.

    The two take turns in random order; two rounds before are not counted.
    """
    grad = torch.randn_like(x)
    steps = [_step(module, x.detach().requires_grad_(), grad) for module in (layer, reference)]
    ratios = []
    for current in range(rounds + 2):
        seconds = [0.0, 0.0]
        for turn in random.sample([0, 1], 2):
            seconds[turn] = steps[turn]()
        if current >= 2:
            ratios.append(seconds[0] / seconds[1])
    return ratios


def _results(layer: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Return y and the gradients by x, what is added and the parameters, in float64."""
    leaves = [x.detach().requires_grad_()]
    if getattr(layer, "fused", None) == "add_relu":
        leaves.append(torch.where(x.flip(0) > 0, FAR, -FAR).to(x.dtype).requires_grad_())
    y = layer(*leaves)
    loss = (y * grad).sum()  # a gradient that is given would make torch import sympy, for seconds
    gradients = torch.autograd.grad(loss, (*leaves, *layer.parameters()))
    return [result.detach().double() for result in (y, *gradients)]


def _step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], float]:
    inputs = (x, *layer.parameters())

    def step() -> float:
        _wait_for(x)
        started = time.perf_counter()
        torch.autograd.grad(layer(x), inputs, grad)
        _wait_for(x)
        return time.perf_counter() - started

    return step


def _wait_for(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def run(arguments: list[str]) -> int:
    """Run `nm doctor` and return its exit code: 0, or 1 if a layer disagrees with its formula."""
    ArgumentParser(
        prog="nm doctor",
        description="Print versions and devices, which backend computes which norm and int8 layer "
        "and why, and the result of a self-check: forward and backward against the formula, and "
        "the time against torch's norms. It takes about ten seconds. Paste it into a bug report.",
    ).parse_args(arguments)
    _print_rows([*describe_versions(), *describe_devices(), *describe_kernels()])
    wrong = False
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        _print_backends(device)
        _print_int8_backends(device)
        norms, int8 = list(check_norms(device)), list(check_int8(device))
        _print_checks(f"{device}: forward and backward against the formula in float64", norms)
        _print_checks(f"{device}: int8, forward and backward against the formula", int8)
        _print_times(device)
        wrong = wrong or any(check.failed for check in (*norms, *int8))
    return FAILED_CHECK if wrong else 0


def _print_rows(rows: Rows) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print_words(f" {name:<{width}}  {value}")


def _print_backends(device: str) -> None:
    """Print a table of norms by dtypes, and below it why it is the formula."""
    marks: dict[str, str] = {}  # of each reason
    rows = [
        [subject.name, *(_describe_backends(subject, x, device, marks) for x in DTYPES)]
        for subject in SUBJECTS
    ]
    _print_table([f"{device}: backends", *map(_name, DTYPES)], rows, marks)
    print_words(" Compiled networks use the formula, which the compiler fuses.\n")


def _print_int8_backends(device: str) -> None:
    """Print a table of layers in int8 by the output and the input's gradient."""
    marks: dict[str, str] = {}
    described = describe_backends(nn.ModuleDict(make_int8_layers(device)))
    rows = [[name, *(_mark(*each[:2], marks) for each in both)] for name, both in described.items()]
    _print_table([f"{device}: int8 layers", "output", "gradient of the input"], rows, marks)
    print_words("")


def _print_table(headings: list[str], rows: list[list[str]], marks: dict[str, str]) -> None:
    """Print a table of backends, and below it why they are the formula."""
    show(Grid(headings, rows))
    for reason, mark in marks.items():
        print_words(f" {mark}  {reason}")


def _print_checks(title: str, checks: Sequence[Check]) -> None:
    """Print the worst of each backend and dtype, and everything that is wrong."""
    worst: dict[tuple[str, torch.dtype], list[Check]] = defaultdict(list)
    for check in checks:
        worst[check.backend, check.dtype].append(check)
    print_words(f" {title}")
    for (backend, dtype), group in worst.items():
        error = max(check.error for check in group)
        wrong = [check for check in group if check.failed]
        fate = f"{len(wrong)} WRONG" if wrong else "right"
        what = f"{backend}, {_name(dtype)}: {len(group)} cases {fate}"
        print_words(f" {what}, largest error {error:.1e} of the largest value")
        for check in wrong:
            what = f"{check.subject} {check.layout}".strip()
            print_words(f"   WRONG: {what}: {check.error:.1e}")
    print_words("")


def _print_times(device: str) -> None:
    """Print, of each norm that has kernels, the quartiles of its time against torch's norm."""
    shapes = " and ".join(map(str, TIMED.values()))
    print_words(f" {device}: times of {shapes}, float32, {ROUNDS} rounds each")
    rows: Rows = []
    for subject in (subject for subject in SUBJECTS if subject.timed):
        x = torch.randn(TIMED[subject.dims], device=device)
        layer, torchs = (make(x.shape[1]).to(device) for make in (subject.make, subject.torchs))
        ratios = time_ratios(layer, torchs, x, ROUNDS)
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        rows.append((subject.name, f"{ratio} of {subject.torchs.__name__}"))
    _print_rows(rows)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
