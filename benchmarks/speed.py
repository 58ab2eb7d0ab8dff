"""Every target of speed and memory, as ratios from interleaved rounds, beside their targets.

    python benchmarks/speed.py [--only N2 N3] [--rounds 20] [--json FILE] [--markdown FILE]

N1 to N12 and C2 to C11 are measured on the CPU, H1 to H7 on a GPU where there is one. Freed memory
is kept, as in `nm fit`. See `docs/speed.md`.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import replace
from pathlib import Path

import pytorch_lightning as pl
import torch
import torchvision
from rich.console import Console
from speed_gpu_layers import measure_gpu_layers
from speed_gpu_training import measure_cifar, measure_large_step
from speed_layers import (
    list_backends,
    measure_fused,
    measure_norms,
    measure_small,
    measure_tokens,
)
from speed_networks import measure_activations, measure_compiled, measure_step
from speed_plan import QUICK, Plan
from speed_processes import measure_allocator, measure_fits, measure_starts
from speed_tables import format_row, make_json, make_table, write_results
from speed_weights import measure_records, measure_weight_norm
from targets import Measurement, Result, Skipped

from nmlightning.allocator import keep_freed_memory, unsupported_reason
from nmlightning.commands.failures import filter_logs

Measure = Callable[[Plan, Set[str]], Iterator[Result]]

ON_CPU: dict[tuple[str, ...], Measure] = {
    ("N1",): measure_allocator,
    ("N2",): measure_small,
    ("N3", "N4", "N5", "C4", "C5"): measure_norms,
    ("C2", "C3"): measure_fused,
    ("N6",): measure_weight_norm,
    ("N7",): measure_step,
    ("C7",): measure_activations,
    ("N8", "C9"): measure_fits,
    ("N9",): measure_tokens,
    ("N10",): measure_compiled,
    ("N11", "C11"): measure_records,
    ("N12",): measure_starts,
}
ON_GPU: dict[tuple[str, ...], Measure] = {
    ("H1", "H2", "H3", "H4"): measure_gpu_layers,
    ("H5",): measure_large_step,
    ("H6", "H7"): measure_cifar,
}
WIDTH = 150  # of a table that is written to a file
TARGETS = [name for names in (*ON_CPU, *ON_GPU) for name in names]


def main() -> None:
    """Measure what was asked for, print each row when it is known, and the table at the end."""
    options = parse(sys.argv[1:])
    memory = "kept" if keep_freed_memory() else f"given back: {unsupported_reason()}"
    plan = QUICK if options.quick else Plan()
    plan = replace(plan, rounds=options.rounds or plan.rounds)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    header = [*describe_machine(), f"freed memory: {memory}", *list_backends(plan)]
    for line in header:
        console.print(line, markup=False, soft_wrap=True)
    results = []
    with filter_logs():
        for row in measure(plan, set(options.only)):
            if options.quick and isinstance(row, Measurement):  # whose sizes no target is for
                row = replace(row, bound=None)
            results.append(row)
            line = format_row(row) if isinstance(row, Measurement) else f"{row.target}: {row.why}"
            console.print(line, markup=False, soft_wrap=True)
    console.print(make_table(results))
    if options.json:
        options.json.write_text(json.dumps(make_json(results, header), indent=1), encoding="utf-8")
    if options.markdown:
        write_results(options.markdown, results, header)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=TARGETS, metavar="TARGET")
    parser.add_argument("--rounds", type=int, help="of a layer; networks get half as many")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes and 3 rounds, to see that it runs"
    )
    parser.add_argument("--json", type=Path, help="write every case to this file")
    parser.add_argument("--markdown", type=Path, help="or into this page, between its markers")
    return parser.parse_args(words)


def measure(plan: Plan, wanted: Set[str]) -> Iterator[Result]:
    """Yield the rows of the targets that are wanted, as soon as each is known."""
    for names, rows in ON_CPU.items():
        if wanted & set(names):
            yield from rows(plan, wanted & set(names))
    for names, rows in ON_GPU.items():
        due = sorted(wanted & set(names))
        if due and torch.cuda.is_available():
            yield from rows(plan, set(due))
        else:
            yield from (Skipped(name, "no CUDA device is here") for name in due)


def describe_machine() -> list[str]:
    """Return the command, the versions and the devices."""
    command = " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    versions = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "Lightning": pl.__version__,
    }
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    number = torch.get_num_threads()
    threads = f"{number} threads" if number > 1 else "one thread, in both columns,"
    threads += f" on {os.cpu_count()} cores"
    return [command, packages, f"CPU {processor()}, {threads}; CUDA device: {gpu}"]


def processor() -> str:
    """Return the name of the CPU, where the system gives it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
