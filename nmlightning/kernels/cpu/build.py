"""Builds, finds and loads the library of the CPU's kernels."""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from uuid import uuid4

import torch

from nmlightning.atomic_file import explain_failure
from nmlightning.errors import InputError

SOURCES = Path(__file__).parent / "csrc"
_SUFFIXES = (".cpp", ".h")
_SEAL = hashlib.sha256().digest_size
# NaN and infinities stay what they are: none of -ffast-math that assumes there are none. Torch's
# threads are used, not those of a second OpenMP: the library is linked without one.
_FLAGS = ("-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-march=native")
# GCC takes half of what AVX-512 has, unless a flag says that the whole pays.
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
LOG = "build.log"
NOT_BUILT = "the kernels are not built: nm kernels build"
BEING_BUILT = "the kernels are being built in the background, for the next start"
_UNFINISHED = "unfinished-"
_FORMULA = "The norms use the formula"
# In a process of its own, which takes one core where nothing else wants it.
_BUILD = """
import os, sys
from pathlib import Path
sys.path = [*filter(None, sys.path), sys.argv[1]]
os.nice(19)
from nmlightning.kernels.cpu.build import build_library, library_path, unusable_reason
folder = Path(sys.argv[2])
if unusable_reason(library_path(folder)):  # still, since starting takes long beside other work
    build_library(folder)
"""
# In a process of its own, which is given the folder of ninja in its PATH and leaves nothing loaded.
# That it loads what it has built is a first test of it. Its input ends with the process that asked
# for it, however that ends; then it ends the compilers, which are in its group, and removes their
# folder, which it has made itself.
_COMPILE = """
import json, os, shutil, signal, sys, threading, time, traceback
arguments = json.loads(sys.argv[1])
folder = arguments["build_directory"]
os.setpgid(0, 0)  # no new session, in which some kernels would count niceness anew
os.mkdir(folder)
def clean_up():
    sys.stdin.read()
    os.killpg(0, signal.SIGTERM)
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            break
        time.sleep(0.1)
    os._exit(0)
signal.signal(signal.SIGTERM, lambda *_: None)
cleaner = threading.Thread(target=clean_up)
cleaner.start()
try:
    from torch.utils.cpp_extension import load
    load(**arguments, is_python_module=False, verbose=True)
    open(os.path.join(folder, "done"), "w").close()
except BaseException:
    traceback.print_exc()
sys.stdout.flush()
os.close(1)
os.close(2)
cleaner.join()
"""
_OPERATORS = (
    *("batch_norm", "batch_norm_backward", "track", "sums", "sums_of_sizes", "largest", "affine"),
    *("gradient_sums", "gradient", "layer_norm"),
    *("normalise_weights", "normalise_weight", "row_norms", "step_norms", "copy_weights"),
    *("ends", "random_bits", "quantize", "convert_elements", "flip_kernels"),
)
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_folder() -> Path:
    """Return the user's folder for what can be made again, in `$XDG_CACHE_HOME` if that is set."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    home = given if given.is_absolute() else Path.home() / ".cache"
    return home / "nmlightning" / "kernels"


def library_path(folder: Path) -> Path:
    """Return where in the folder the library for this machine, torch and source lies, if built."""
    return folder / f"{_key()}.so"


def is_loaded() -> bool:
    return all(hasattr(torch.ops.nmlightning, name) for name in _OPERATORS)


def seal(path: Path) -> None:
    """Write the hash of a library behind it, which loading it does not mind."""
    content = path.read_bytes()
    path.write_bytes(content + hashlib.sha256(content).digest())


def is_whole(path: Path) -> bool:
    """Return whether a library is there and complete: loading half of one is a crash."""
    if not path.is_file():
        return False
    content = path.read_bytes()
    return content[-_SEAL:] == hashlib.sha256(content[:-_SEAL]).digest()


def unusable_reason(path: Path) -> str:
    """Return why a library is not to be loaded, which runs what is in it; nothing if it is.

    It and its folder belong to the user or to root, and nobody else may write to them.
    """
    if not path.exists():
        return BEING_BUILT if _is_locked(path.parent) else NOT_BUILT
    for place in dict.fromkeys((path.parent, path.resolve().parent, path)):
        status = place.stat()
        if status.st_uid not in (os.getuid(), 0):
            return f"{place} belongs to another user: set XDG_CACHE_HOME to a folder of your own"
        if status.st_mode & _OTHERS_MAY_WRITE:
            return f"others may write to {place}: nm kernels build"
    return "" if is_whole(path) else f"the kernels in {path} are damaged: nm kernels build"


def load_library(path: Path) -> None:
    """Make the built library's operators torch's, once in a process."""
    if not is_loaded():
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]


def flags() -> tuple[str, ...]:
    return _FLAGS + _FLAGS_OF_MACHINE.get(platform.machine(), ())


def source_files() -> list[Path]:
    """Return the files that the library is compiled from, headers among them."""
    return sorted(path for path in SOURCES.iterdir() if path.suffix in _SUFFIXES)


@lru_cache(maxsize=1)
def _key() -> str:
    """Return the key of a library: torch, sources, flags, and the processor's features."""
    hashed = hashlib.sha256()
    for word in (*flags(), platform.machine(), platform.system(), *_processor()):
        hashed.update(word.encode() + b"\n")
    for path in source_files():
        hashed.update(path.name.encode() + path.read_bytes())
    return f"torch-{torch.__version__}-{hashed.hexdigest()[:16]}"


def _processor() -> list[str]:
    """Return the lines about the first processor that say what code it can run."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return [platform.processor()]
    first = cpuinfo.read_text().partition("\n\n")[0].splitlines()
    return [line for line in first if line.partition(":")[0].strip() in _PROCESSOR]


def build_library(folder: Path) -> Path:
    """Compile the kernels for this machine and this torch, and return the library.

    What is being built is in a new folder of its own, and moved into place whole at the end: one
    process that is killed leaves nothing. A second waits for the first, and takes what it has made.
    """
    library = library_path(folder)
    is_new = not library.exists()
    check_toolchain()
    check_folder(folder)
    unfinished = folder / f"{_UNFINISHED}{uuid4().hex[:12]}"
    with _locked(folder):
        if is_new and not unusable_reason(library):
            return library
        try:
            return _compile(unfinished, library)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def start_build(folder: Path) -> str:
    """Have the library built by another process, which this one need not outlive.

    Returns:
        What to say of it: `BEING_BUILT`, or why it is not built.
    """
    log = folder / LOG
    try:
        if log.is_file() and library_path(folder).name in log.read_text(errors="replace"):
            return f"the kernels did not compile, see {log}; nm kernels build tries again"
        check_toolchain()
        check_folder(folder)
    except (InputError, OSError) as error:
        return str(error).removesuffix(f". {_FORMULA}.")
    if not _is_locked(folder):
        command = [sys.executable, "-c", _BUILD, str(SOURCES.parents[3]), str(folder)]
        silent = [(os.POSIX_SPAWN_OPEN, i, os.devnull, os.O_RDWR, 0) for i in range(3)]
        environment = {"MAX_JOBS": "1"} | os.environ
        os.posix_spawn(command[0], command, environment, file_actions=silent, setpgroup=0)
    return BEING_BUILT


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, where its file system has locks, or wait for who does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_locked(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    finally:
        os.close(descriptor)
    return False


def check_folder(folder: Path) -> None:
    """Make the folder, the user's alone, or raise InputError unless things can be put into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{folder} cannot be written to: {error.strerror}. {_FORMULA}.") from error


def check_toolchain() -> None:
    """Raise InputError, which says what is missing, unless there is all that a build needs."""
    if sys.platform != "linux":
        raise InputError(
            f"the kernels are built on Linux only, this is {sys.platform}. {_FORMULA}."
        )
    if shutil.which(_compiler().split()[0]) is None:
        raise InputError(
            f"there is no C++ compiler {_compiler()!r}; install one, on Debian or Ubuntu by "
            f"`apt install g++`. {_FORMULA}."
        )
    if shutil.which("ninja", path=_search_path()) is None:
        raise InputError(f"there is no ninja; `pip install ninja` installs it. {_FORMULA}.")


def remove_libraries(folder: Path) -> list[Path]:
    """Delete all libraries in the folder and what builds have left, and return what they were."""
    found = [*folder.glob("torch-*.so"), *folder.glob(f"{_UNFINISHED}*"), *folder.glob(LOG)]
    for path in found:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)  # a running build puts things there
        else:
            path.unlink(missing_ok=True)
    return found


def _compile(build_folder: Path, library: Path) -> Path:
    """Compile in a folder, new and gone at the end, and put the library in its place."""
    sources = [str(path) for path in source_files() if path.suffix == ".cpp"]
    arguments = {
        "name": "nmlightning_kernels",
        "sources": sources,
        "extra_cflags": list(flags()),
        "build_directory": str(build_folder),
    }
    log = library.parent / LOG
    with subprocess.Popen(
        [sys.executable, "-c", _COMPILE, json.dumps(arguments)],
        env=os.environ | {"PATH": _search_path()},
        cwd=library.parent,  # the user's own, from which it imports, too
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as compiling:
        assert compiling.stdout is not None, "asked for"
        words = compiling.stdout.read()
        with explain_failure(library):
            if not (build_folder / "done").exists():
                log.write_text(f"{library.name}\n{words}")
                raise InputError(
                    f"the kernels did not compile; the compiler's output is in {log}. {_FORMULA}."
                )
            log.unlink(missing_ok=True)
            made = build_folder / f"{arguments['name']}.so"
            seal(made)
            made.chmod(0o755)
            return made.replace(library)


def _compiler() -> str:
    return os.environ.get("CXX") or "c++"


def _search_path() -> str:
    """Return PATH after the folder of this Python's own commands, such as ninja from PyPI."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    return os.pathsep.join(folders)
