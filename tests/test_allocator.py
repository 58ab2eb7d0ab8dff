"""Test that freed memory is kept where it is asked for, and nothing else says otherwise."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nmlightning.allocator import unsupported_reason
from nmlightning.cli import main
from nmlightning.commands import run_report
from scripts import run_python

# Whether it is kept, why not, and whether the last round met pages that it had had before.
SCRIPT = """
import ctypes, resource
from nmlightning.allocator import keep_freed_memory, unsupported_reason
kept, c = keep_freed_memory(), ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (1 << 20, 33 << 20, 128 << 20):
        places = [ctypes.c_void_p(c.malloc(size)) for _ in range(2)]
        for place in places: ctypes.memset(place, 1, size); c.free(place)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, unsupported_reason(), faults[-1] < 100, sep="|")
"""
OTHER = (
    "void *__libc_malloc(unsigned long); void *malloc(unsigned long n) {return __libc_malloc(n);}"
)


@pytest.mark.skipif(unsupported_reason() != "", reason="another allocator than glibc's")
@pytest.mark.parametrize(
    ("name", "value", "answer"),
    [
        ("MALLOC_ARENA_MAX", "2", "True||True"),
        ("MALLOC_TRIM_THRESHOLD_", "9", "False|MALLOC_TRIM_THRESHOLD_ is set|False"),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_max=9", "False|glibc.malloc.mmap_max is set|False"),
        ("LD_PRELOAD", "./other.so", "False|another allocator than glibc's is loaded|False"),
    ],
)
def test_freed_memory_is_kept_unless_told(
    name: str, value: str, answer: str, tmp_path: Path
) -> None:
    if name == "LD_PRELOAD":
        compiler = shutil.which("cc") or pytest.skip("no compiler makes another allocator")
        command = [compiler, "-shared", "-fPIC", "-xc", "-", "-o", "other.so"]
        subprocess.run(command, input=OTHER, text=True, check=True, cwd=tmp_path)
    assert run_python("-c", SCRIPT, cwd=tmp_path, **{name: value}).stdout == f"{answer}\n"


@pytest.mark.parametrize(("options", "kept"), [([], 1), (["--keep_freed_memory", "false"], 0)])
def test_fit_keeps_freed_memory(
    options: list[str], kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    calls: list[Any] = []
    monkeypatch.setattr(run_report, "keep_freed_memory", lambda: calls.append(None))
    config = ["--config", "quickstart", "--trainer.fast_dev_run", "true"]
    assert main(["fit", *config, "--trainer.accelerator", "cpu", *options]) == 0
    assert len(calls) == kept
