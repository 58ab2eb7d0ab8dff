"""What this machine has, in rows of a name and a value."""

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import nmlightning
from nmlightning.norms.kernels.cpu.library import cache_folder, is_whole, library_path

Rows = list[tuple[str, str]]

NEEDED = (
    *("torch", "pytorch-lightning", "torchmetrics", "torchvision", "tensorboard"),
    *("jsonargparse", "numpy", "rich"),
)
OPTIONAL = (
    *("lightning", "triton", "ninja", "timm", "litdata", "onnx", "datasets"),
    *("tokenizers", "sacrebleu"),
)


def describe_versions() -> Rows:
    """Return the versions of this package, of Python, and of what it needs or may use."""
    return [
        ("nmlightning", nmlightning.__version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("needs", _list(NEEDED)),
        ("may use", _list(OPTIONAL)),
    ]


def describe_devices() -> Rows:
    """Return the CPU and the GPUs."""
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    cpu = f"{_cpu_name()}, {threads}, {torch.backends.cpu.get_cpu_capability()}"
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else ""
        return [("CPU", cpu), ("GPU", "none" + (f" ({built})" if built else ""))]
    return [("CPU", cpu), *(("GPU", _describe_gpu(i)) for i in range(torch.cuda.device_count()))]


def describe_kernels() -> Rows:
    """Return whether the kernels for the CPU are built, and where."""
    path = library_path(cache_folder())
    if not path.exists():
        return [("C++ kernels", "not built: nm kernels build")]
    return [("C++ kernels", f"{path} {'' if is_whole(path) else 'is damaged: nm kernels build'}")]


def _describe_gpu(index: int) -> str:
    gpu = torch.cuda.get_device_properties(index)
    memory = gpu.total_memory / 2**30
    return f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {memory:.0f} GiB, CUDA {torch.version.cuda}"


def _cpu_name() -> str:
    """Return what the CPU calls itself, as far as the system tells."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _list(packages: Iterable[str]) -> str:
    return ", ".join(f"{package} {_version(package)}" for package in packages)


def _version(package: str) -> str:
    if package == "torch":
        return str(torch.__version__)  # with what it is built for
    try:
        return version(package)
    except PackageNotFoundError:
        return "–"
