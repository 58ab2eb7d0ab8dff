"""`nm kernels`: builds the norms' kernels for the CPU, shows them, and removes them."""

import time

from nmlightning.commands.argument_parser import ArgumentParser, print_line

ACTIONS = ("build", "show", "remove")


def run(arguments: list[str]) -> int:
    parser = ArgumentParser(
        prog="nm kernels",
        description="Build the L1, L∞ and Top(k) norms for this machine's CPU, in C++, once for "
        "every version of torch and of nmlightning; show what is built; or remove it. Without them "
        "the norms are computed by the formula, in torch's own operations: the same, but slower.",
    )
    parser.add_argument("action", choices=ACTIONS, help="what to do")
    action = parser.parse_args(arguments).action
    from nmlightning.kernels.cpu import build

    folder = build.cache_folder()
    path = build.library_path(folder)
    reason = build.unusable_reason(path)
    if action == "remove":
        removed = build.remove_libraries(folder)
        for library in removed:
            print_line("removed", library)
        if not removed:
            print_line("kernels", f"there are none in {folder}")
    elif action == "show":
        print_line("kernels", reason or f"{path}, {path.stat().st_size / 2**20:.1f} MB")
        for other in folder.glob("torch-*.so"):
            if other != path:
                print_line("other", f"{other}, for another CPU, torch or nmlightning")
    elif not reason:
        print_line("kernels", f"{path}, built already")
    else:
        build.check_toolchain()
        build.check_folder(folder)
        print_line("building", "the kernels for this CPU, about a minute on two cores")
        begin = time.monotonic()
        path = build.build_library(folder)
        print_line("kernels", f"{path}, built in {time.monotonic() - begin:.0f} s")
    return 0
