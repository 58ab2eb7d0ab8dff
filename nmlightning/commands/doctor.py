"""`nm doctor`: what is installed, who computes which norm, and whether it is right on this machine.

The first thing that a report of a bug holds: plain text, narrow enough to paste.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from nmlightning.commands.argument_parser import ArgumentParser
from nmlightning.commands.exit_codes import FAILED_CHECK
from nmlightning.commands.installation import (
    Rows,
    describe_devices,
    describe_kernels,
    describe_versions,
)
from nmlightning.commands.norm_check import (
    DTYPES,
    ROUNDS,
    TIMED,
    Check,
    check_norms,
    describe_serving,
    time_norms,
)

WIDTH = 100


def run(arguments: list[str]) -> int:
    """Run `nm doctor` and return its exit code: 0, or 1 if a norm disagrees with its formula."""
    ArgumentParser(
        prog="nm doctor",
        description="Print versions and devices, which backend computes which norm and why, and "
        "the result of a self-check: forward and backward against the formula in float64, and the "
        "time against torch's norms. It takes about ten seconds. Paste it into a bug report.",
    ).parse_args(arguments)
    console = Console(width=WIDTH, highlight=False)
    _print_rows(console, [*describe_versions(), *describe_devices(), *describe_kernels()])
    wrong = False
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        _print_serving(console, device)
        checks = list(check_norms(device))
        _print_checks(console, device, checks)
        _print_times(console, device)
        wrong = wrong or any(check.failed for check in checks)
    return FAILED_CHECK if wrong else 0


def _print_rows(console: Console, rows: Rows) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(f" {name}", value)
    console.print(table)


def _print_serving(console: Console, device: str) -> None:
    """Print a table of norms by dtypes, and below it why the formula is what serves."""
    serving = describe_serving(device)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in (f" {device}: who computes", *map(_name, DTYPES)):
        table.add_column(heading)
    for subject, cells in serving.cells.items():
        table.add_row(f" {subject}", *cells)
    console.print(table)
    for mark, reason in serving.reasons.items():
        console.print(f" {mark} {reason}")
    console.print(" In compiled networks it is the formula, which the compiler fuses.\n")


def _print_checks(console: Console, device: str, checks: Sequence[Check]) -> None:
    """Print the worst of each backend and dtype, and everything that is wrong."""
    worst: dict[tuple[str, torch.dtype], list[Check]] = defaultdict(list)
    for check in checks:
        worst[check.backend, check.dtype].append(check)
    console.print(f" {device}: forward and backward against the formula in float64")
    for (backend, dtype), group in worst.items():
        error = max(check.error for check in group)
        wrong = [check for check in group if check.failed]
        fate = f"{len(wrong)} WRONG" if wrong else "right"
        what = f"{backend}, {_name(dtype)}: {len(group)} cases {fate}"
        console.print(f" {what}, at most {error:.1e} of the largest value apart")
        for check in wrong:
            console.print(f"   WRONG: {check.subject} {check.layout}: {check.error:.1e}")
    console.print()


def _print_times(console: Console, device: str) -> None:
    shapes = " and ".join(map(str, TIMED.values()))
    console.print(f" {device}: time against torch's norm, float32, {shapes}, {ROUNDS} rounds each")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for subject, low, middle, high in time_norms(device):
        ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        table.add_row(f" {subject.name}", f"{ratio} of {subject.torchs.__name__}")
    console.print(table)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
