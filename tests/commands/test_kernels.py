"""`nm kernels`: what it says, and what is missing where it cannot build."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nmlightning.errors import InputError
from nmlightning.kernels.cpu import build

Nm = Callable[..., Any]


@pytest.fixture
def nm(nm: Nm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nm:
    """Run `nm kernels` with a home of its own, and return what it answers."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    return partial(nm, "kernels")


@pytest.fixture
def _toolchain() -> None:
    try:
        build.check_toolchain()
    except InputError as error:
        pytest.skip(str(error))


def test_kernels_show_without_a_build(nm: Nm, tmp_path: Path) -> None:
    shown = " kernels     the kernels are not built: nm kernels build"
    assert nm("show") == (0, [shown], [])
    assert nm("remove").out == [f" kernels     there are none in {build.cache_folder()}"]
    assert tmp_path in build.cache_folder().parents


def test_kernels_show_after_a_build(nm: Nm) -> None:
    path = build.library_path(build.cache_folder())
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(2**20))
    build.seal(path)
    (path.parent / "torch-1.0-old.so").touch()
    (path.parent / "unfinished-by-a-killed-process").mkdir()
    (path.parent / "of-the-user.so").touch()
    assert nm("build").out == [f" kernels     {path}, built already"]
    shown = "\n".join(nm("show").out)
    assert f"{path}, 1.0 MB" in shown
    assert "torch-1.0-old.so, for another CPU, torch or nmlightning" in shown
    assert "".join(nm("remove").out).count(" removed ") == 3
    assert [other.name for other in path.parent.iterdir()] == ["of-the-user.so"]


@pytest.mark.usefixtures("_toolchain")
def test_kernels_build_makes_a_library(nm: Nm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a short source for the kernels': what is compiled must load as an extension."""
    source = Path.home() / "short.cpp"
    source.write_text('extern "C" void nothing() {}\n')
    monkeypatch.setattr(build, "source_files", lambda: [source])
    monkeypatch.setattr(build, "flags", lambda: ("-O0",))
    code, (building, built), err = nm("build")
    assert (code, err) == (0, [])
    assert "about a minute" in building
    path = build.library_path(build.cache_folder())
    assert built.startswith(f" kernels     {path}, built in ")
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.usefixtures("_toolchain")
def test_kernels_build_reports_a_compiler_error(nm: Nm, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path.home() / "wrong.cpp"
    source.write_text("int main() { return nothing; }\n")
    monkeypatch.setattr(build, "source_files", lambda: [source])
    code, _, err = nm("build")
    log = build.cache_folder() / "build.log"
    assert code == 2
    line = f"nm: the kernels did not compile; the compiler's output is in {log}. The norms use the "
    assert err == [f"{line}formula."]
    assert "nothing" in log.read_text()
    assert [file.name for file in log.parent.iterdir()] == [log.name]
    assert nm("show").out[-1].endswith("nm kernels build")


@pytest.mark.parametrize("missing", ["compiler", "ninja", "Linux", "folder"])
def test_kernels_build_reports_a_missing_tool_in_one_line(
    nm: Nm, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {
        "compiler": "there is no C++ compiler 'no-such-compiler'; install one",
        "ninja": "there is no ninja; `pip install ninja` installs it",
        "Linux": "the kernels are built on Linux only, this is win32",
        "folder": f"{build.cache_folder()} cannot be written to",
    }
    if missing == "compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    else:
        (tmp_path / "c++").touch(mode=0o755)
        (tmp_path / ("ninja" if missing != "ninja" else "nothing")).touch(mode=0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    if missing == "Linux":
        monkeypatch.setattr(sys, "platform", "win32")
    if missing == "folder":
        (tmp_path / ".cache").write_text("a file")
    code, _, (line,) = nm("build")
    assert code == 2
    assert line.startswith(f"nm: {expected[missing]}")
    assert line.endswith("The norms use the formula.")


def test_kernels_are_not_built_by_a_fit(nm: Nm) -> None:
    from nmlightning.kernels.cpu.backend import CpuBackend

    backend = CpuBackend(build.cache_folder())
    if not build.is_loaded():
        assert backend._missing() == build.NOT_BUILT
        assert backend.tracking() is None
        path = build.library_path(build.cache_folder())
        path.parent.mkdir(parents=True)
        path.write_text("half a file")
        damaged = f"the kernels in {path} are damaged: nm kernels build"
        with pytest.warns(UserWarning, match=re.escape(f"The norms use the formula: {damaged}")):
            assert backend._missing() == damaged
        assert nm("show").out == [f" kernels     {damaged}"]
        build.seal(path)
        unreadable = f"the kernels in {path} do not load: nm kernels remove"
        with pytest.warns(UserWarning, match=re.escape(unreadable)):
            assert backend._missing() == unreadable
    assert os.listdir(Path.home()) in ([], [".cache"])


def make_library(folder: Path) -> Path:
    """Write what is taken for a whole library, and is none."""
    path = build.library_path(folder)
    path.parent.mkdir(parents=True, mode=0o700)
    path.write_bytes(b"no code")
    build.seal(path)
    assert build.unusable_reason(path) == ""
    return path


def test_kernels_of_others_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_library(tmp_path / "kernels")
    for place in (path, path.parent):
        place.chmod(place.stat().st_mode | 0o020)
        assert build.unusable_reason(path) == f"others may write to {place}: nm kernels build"
        place.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    if path.stat().st_uid:  # root's are trusted
        assert build.unusable_reason(path).startswith(f"{path.parent} belongs to another user: set")
    else:
        os.chown(path, 1, -1)
        assert build.unusable_reason(path).startswith(f"{path} belongs to another user: set XDG_C")


def test_kernels_need_the_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nmlightning.kernels.cpu import backend

    path = make_library(tmp_path / "kernels")
    monkeypatch.setattr(build, "is_loaded", lambda: False)
    monkeypatch.setattr(build, "load_library", lambda path: None)
    with pytest.warns(UserWarning, match="The norms use the formula: .* holds other operators"):
        assert "holds other operators" in backend.CpuBackend(path.parent)._missing()


def test_kernels_lie_in_the_cache_of_the_user(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / "nmlightning" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification ignores
    assert build.cache_folder() == Path.home() / ".cache" / "nmlightning" / "kernels"


@pytest.mark.usefixtures("_toolchain")
@pytest.mark.parametrize("seconds", [0.3, 4.0])  # the compilers begin after about one
def test_kernels_build_leaves_nothing_when_it_is_killed(seconds: float, tmp_path: Path) -> None:
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    words = [sys.executable, "-m", "nmlightning", "kernels", "build"]
    folder = tmp_path / "nmlightning" / "kernels"
    with subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL) as process:
        wait_until(lambda: any(folder.glob("unfinished-*")))
        time.sleep(seconds)
        process.kill()
    wait_until(lambda: not os.listdir(folder))


# Compiles nothing, and ends with the exit code.
COMPILER = """\
#!/bin/sh
for word; do shift; case $word in
    *.cpp) set -- "$@" -x c++ /dev/null;;
    *) set -- "$@" "$word";; esac; done
c++ "$@" && exit %s
"""


@pytest.mark.usefixtures("_toolchain")
@pytest.mark.parametrize("code", [0, 1])
def test_kernels_are_built_in_the_background(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cxx").write_text(COMPILER % code)
    (tmp_path / "cxx").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "cxx"))
    folder = tmp_path / "kernels"
    path, log = build.library_path(folder), folder / build.LOG
    assert build.start_build(folder) == build.BEING_BUILT
    wait_until(lambda: any(folder.glob("unfinished-*")))
    assert build.unusable_reason(path) == build.start_build(folder) == build.BEING_BUILT
    assert len(list(folder.iterdir())) == 1
    left = [log if code else path]
    wait_until(lambda: list(folder.iterdir()) == left)
    wait_until(lambda: build.unusable_reason(path) != build.BEING_BUILT)
    assert build.unusable_reason(path) == ("" if code == 0 else build.NOT_BUILT)
    if code:
        assert build.start_build(folder).startswith(f"the kernels did not compile, see {log}; ")


def test_kernels_say_why_they_are_not_built_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for folder, reason in {
        "file": "file cannot be written to: ",
        "new": "there is no C++ comp",
    }.items():
        assert reason in build.start_build(tmp_path / folder)
        monkeypatch.setenv("CXX", "no-such-compiler")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300  # a build in the background waits for other processes
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
