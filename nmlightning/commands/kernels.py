"""`nm kernels`: builds the norms' kernels for the CPU, shows them, and removes them."""

import argparse
import time
from pathlib import Path

from nmlightning.commands.argument_parser import ArgumentParser, print_line

ACTIONS = ("build", "show", "remove")


def run(arguments: list[str]) -> int:
    action = _parse(arguments).action
    from nmlightning.kernels.cpu.build import cache_folder

    {"build": _build, "show": _show, "remove": _remove}[action](cache_folder())
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="nm kernels",
        description="Build the L1, L∞ and Top(k) norms for this machine's CPU, in C++, once for "
        "every version of torch and of nmlightning; show what is built; or remove it. Without them "
        "the norms are computed by the formula, in torch's own operations: the same, but slower.",
    )
    parser.add_argument("action", choices=ACTIONS, help="what to do")
    return parser.parse_args(arguments)


def _build(folder: Path) -> None:
    from nmlightning.kernels.cpu import build

    path = build.library_path(folder)
    if not build.unusable_reason(path):
        print_line("kernels", f"{path}, built already")
        return
    build.check_toolchain()
    build.check_folder(folder)
    print_line("building", "the kernels for this CPU, about a minute on two cores")
    begin = time.monotonic()
    path = build.build_library(folder)
    print_line("kernels", f"{path}, built in {time.monotonic() - begin:.0f} s")


def _show(folder: Path) -> None:
    from nmlightning.kernels.cpu.build import library_path, unusable_reason

    path = library_path(folder)
    reason = unusable_reason(path)
    print_line("kernels", reason or f"{path}, {path.stat().st_size / 2**20:.1f} MB")
    others = [other for other in folder.glob("torch-*.so") if other != path]
    for other in others:
        print_line("other", f"{other}, for another CPU, torch or nmlightning")


def _remove(folder: Path) -> None:
    from nmlightning.kernels.cpu.build import remove_libraries

    removed = remove_libraries(folder)
    for path in removed:
        print_line("removed", path)
    if not removed:
        print_line("kernels", f"there are none in {folder}")
