"""The built library of the CPU's kernels: where it lies, and how it becomes torch's operators."""

import hashlib
import platform
from functools import lru_cache
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
_SUFFIXES = (".cpp", ".h")
_SEAL = hashlib.sha256().digest_size
# NaN and infinities stay what they are: none of -ffast-math that assumes there are none. Torch's
# threads are used, not those of a second OpenMP: the library is linked without one.
_FLAGS = ("-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-march=native")
# GCC takes half of what AVX-512 has, unless it is told that the whole pays.
_FLAGS_OF_MACHINE = {"x86_64": ("-mprefer-vector-width=512",)}
# What /proc/cpuinfo calls that on which -march=native depends, on x86 and on ARM.
_PROCESSOR = (
    "vendor_id",
    "cpu family",
    "model",
    "flags",
    "CPU implementer",
    "CPU part",
    "Features",
)


def cache_folder() -> Path:
    """Return the user's folder for what can be made again."""
    return Path.home() / ".cache" / "nmlightning" / "kernels"


def library_path(folder: Path) -> Path:
    """Return where in the folder the library for this machine, torch and source lies, if built."""
    return folder / f"{_key()}.so"


def is_loaded() -> bool:
    """Return whether the operators are there."""
    return hasattr(torch.ops.nmlightning, "l1_forward")


def seal(path: Path) -> None:
    """Write the hash of a library behind it, which loading it does not mind."""
    content = path.read_bytes()
    path.write_bytes(content + hashlib.sha256(content).digest())


def is_whole(path: Path) -> bool:
    """Whether a library is there and all that was sealed: to load the half of one is a crash."""
    if not path.is_file():
        return False
    content = path.read_bytes()
    return content[-_SEAL:] == hashlib.sha256(content[:-_SEAL]).digest()


def load_library(path: Path) -> None:
    """Make the built library's operators torch's, once in a process.

    Raises:
        OSError: a file that is no library for this machine.
    """
    if not is_loaded():
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]


def flags() -> tuple[str, ...]:
    """Return what the compiler is told on this machine."""
    return _FLAGS + _FLAGS_OF_MACHINE.get(platform.machine(), ())


def source_files() -> list[Path]:
    """Return the files that the library is compiled from, headers among them."""
    return sorted(path for path in SOURCES.iterdir() if path.suffix in _SUFFIXES)


@lru_cache(maxsize=1)
def _key() -> str:
    """Return what tells libraries apart: by torch, sources, flags, and what the processor can."""
    hashed = hashlib.sha256()
    for word in (*flags(), platform.machine(), platform.system(), *_processor()):
        hashed.update(word.encode() + b"\n")
    for path in source_files():
        hashed.update(path.name.encode() + path.read_bytes())
    return f"torch-{torch.__version__}-{hashed.hexdigest()[:16]}"


def _processor() -> list[str]:
    """Return the lines about the first processor that tell what code it can run."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return [platform.processor()]
    first = cpuinfo.read_text().partition("\n\n")[0].splitlines()
    return [line for line in first if line.partition(":")[0].strip() in _PROCESSOR]
