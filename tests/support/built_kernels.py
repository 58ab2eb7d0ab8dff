"""The CPU's kernels, built once for all tests, or the reason why they are not."""

from pathlib import Path

import pytest
from filelock import FileLock

from nmlightning.errors import InputError
from nmlightning.kernels.cpu import build
from nmlightning.kernels.dispatch import clear_dispatch_cache


def kernel_library() -> Path:
    """Return the library in the user's cache, built if it is not there; skip without a compiler."""
    path = build.library_path(build.cache_folder())
    if not build.is_whole(path):
        try:
            build.check_toolchain()
        except InputError as error:
            pytest.skip(str(error))
        build.cache_folder().mkdir(parents=True, exist_ok=True)
        with FileLock(build.cache_folder() / "tests.lock"):
            if not build.is_whole(path):
                build.build_library(build.cache_folder())
    return path


def load_kernels() -> None:
    """Make the kernels serve this process."""
    build.load_library(kernel_library())
    clear_dispatch_cache()
