"""The CPU's kernels, built once for all tests, or the reason why they are not."""

from pathlib import Path

import pytest
from filelock import FileLock

from nmlightning.errors import InputError
from nmlightning.kernels.cpu.build import (
    build_library,
    cache_folder,
    check_toolchain,
    is_whole,
    library_path,
    load_library,
)
from nmlightning.kernels.dispatch import clear_dispatch_cache


def kernel_library() -> Path:
    """Return the library in the user's cache, built if it is not there; skip without a compiler."""
    path = library_path(cache_folder())
    if not is_whole(path):
        try:
            check_toolchain()
        except InputError as error:
            pytest.skip(str(error))
        cache_folder().mkdir(parents=True, exist_ok=True)
        with FileLock(cache_folder() / "tests.lock"):
            if not is_whole(path):
                build_library(cache_folder())
    return path


def load_kernels() -> None:
    """Make the kernels serve this process."""
    load_library(kernel_library())
    clear_dispatch_cache()
