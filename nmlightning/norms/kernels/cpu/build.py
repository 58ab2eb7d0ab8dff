"""Compiles the CPU's kernels, by torch's own way of building extensions."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from nmlightning.errors import InputError
from nmlightning.norms.kernels.cpu.library import flags, library_path, seal, source_files

LOG = "build.log"
_UNFINISHED = "unfinished-"
_FORMULA = "The norms go on by the formula"
# In a process of its own, which is given the folder of ninja in its PATH and leaves nothing loaded.
# That it loads what it has built is a first test of it.
_COMPILE = """
import json, sys
from torch.utils.cpp_extension import load
load(**json.loads(sys.argv[1]), is_python_module=False, verbose=True)
"""


def build_library(folder: Path) -> Path:
    """Compile the kernels for this machine and this torch, and return the library.

    What is being built is in a new folder of its own, and moved into place whole at the end: two
    processes may build at once, and what a killed one leaves is never taken for a library.

    Raises:
        InputError: a system other than Linux; no compiler or no ninja; a folder that cannot be
            written to; sources that do not compile, with the path of the compiler's words.
    """
    check_toolchain()
    check_folder(folder)
    with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=folder) as unfinished:
        made = _compile(Path(unfinished), folder / LOG)
        seal(made)
        return made.replace(library_path(folder))


def check_folder(folder: Path) -> None:
    """Make the folder, or raise InputError unless things can be put into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
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
            shutil.rmtree(path, ignore_errors=True)  # a build that is going on puts things there
        else:
            path.unlink(missing_ok=True)
    return found


def _compile(build_folder: Path, log: Path) -> Path:
    sources = [str(path) for path in source_files() if path.suffix == ".cpp"]
    arguments = {
        "name": "nmlightning_kernels",
        "sources": sources,
        "extra_cflags": list(flags()),
        "build_directory": str(build_folder),
    }
    result = subprocess.run(
        [sys.executable, "-c", _COMPILE, json.dumps(arguments)],
        env=os.environ | {"PATH": _search_path()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    made = build_folder / f"{arguments['name']}.so"
    if result.returncode or not made.exists():
        log.write_text(result.stdout)
        raise InputError(
            f"the kernels did not compile; the compiler's words are in {log}. {_FORMULA}."
        )
    log.unlink(missing_ok=True)
    return made


def _compiler() -> str:
    """Return the command that torch calls."""
    return os.environ.get("CXX") or "c++"


def _search_path() -> str:
    """Return PATH after the folder of this Python's own commands, such as ninja from PyPI."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    return os.pathsep.join(folders)
