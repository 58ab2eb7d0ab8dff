"""`nm probe`: what half precision would make of a network's norms, and few bits of its layers."""

import argparse
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nmlightning.commands import files
from nmlightning.commands.argument_parser import ArgumentParser, print_line, print_words
from nmlightning.errors import InputError
from nmlightning.named_code import check_named_code
from nmlightning.probe import report
from nmlightning.reports.formatting import show

_JSON_MARK = '"generator": "nm probe"'


def run(arguments: list[str]) -> int:
    """Run `nm probe` and return its exit code: 0, whatever the norms would do."""
    given, options = _parse(arguments)
    files.check_replaceable("--picture", given.picture, report.GENERATOR, "picture of nm probe")
    if given.json:
        files.check_replaceable("--json", given.json, _JSON_MARK, "answer of nm probe")
    words = ["probe", *_experiment(given.experiment, options), *options]
    paths = files.RunPaths(words)  # a misspelt path is reported before torch is imported
    from nmlightning.commands.probe_run import run_batches

    ranges, directions = run_batches(words[1:], paths, given.batches, given.bits)
    if isinstance(ranges, InputError):
        print_words(str(ranges))
        norms: dict[str, Any] = {"batches": directions.batches, "layers": []}
    else:
        show(ranges.table())
        print_words(ranges.describe())
        norms = ranges.as_plain()
    if directions.layers:
        print()
        show(directions.table())
        print_words(directions.describe())
    if not isinstance(ranges, InputError):
        picture = report.draw_ranges(ranges.layers, *_bands(ranges))
        files.write_file("--picture", given.picture, picture)
        print_line("picture", given.picture)
    if given.json:
        content = {"generator": "nm probe", **norms, "int8": directions.as_plain()}
        files.write_file(
            "--json", given.json, json.dumps(content, indent=1, allow_nan=False) + "\n"
        )
        print_line("numbers", given.json)
    return 0


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return what is given, and the options that are those of `nm fit`."""
    parser = ArgumentParser(
        prog="nm probe",
        usage="nm probe CONFIG|CHECKPOINT [--batches N] [--bits B ...] [--picture FILE] "
        "[--json FILE] [--KEY VALUE ...]",
        description="Run some training batches through a network, change nothing, and report for "
        "each norm layer the range of its inputs and what L2, L1, L∞, Top(10) and range would make "
        "of them with every value in float16, and for each convolution and linear layer how far "
        "8 bits or fewer would turn its input, its weight and its gradient.",
        epilog="Every other option is one of nm fit, such as --data Digits.",
    )
    parser.add_argument(
        "experiment",
        metavar="CONFIG|CHECKPOINT",
        help="a config, or a checkpoint of a run, whose config.yaml is found beside it or given "
        "by --config",
    )
    parser.add_argument("--batches", type=int, default=2, help="how many (default: %(default)s)")
    parser.add_argument(
        "--bits",
        type=int,
        nargs="+",
        choices=range(2, 9),
        default=[8, 4, 2],
        metavar="B",
        help="how many to round to, 2 to 8 (default: 8 4 2)",
    )
    parser.add_argument(
        "--picture",
        type=Path,
        default=Path("norm_ranges.svg"),
        help="the SVG to write (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, help="where to write the numbers, if they are wanted")
    if arguments and arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"):
        parser.error(f"the config or checkpoint comes first, got {arguments[0]!r}")
    given, options = parser.parse_known_args(arguments)
    if given.batches < 1:
        parser.error(f"argument --batches: at least 1, got {given.batches}")
    return given, options


def _experiment(name: str, options: Sequence[str]) -> list[str]:
    """Return the options of `nm fit` that name the config and, if it is one, the checkpoint."""
    if not (name.endswith(".ckpt") or zipfile.is_zipfile(name)):
        return ["--config", name]
    if any(word.split("=")[0] in ("-c", "--config") for word in options):
        return ["--ckpt_path", name]
    config = files.config_of(Path(name))
    if config is None and Path(name).exists():
        raise InputError(f"there is no config.yaml of the run of {name}; give one by --config.")
    if config:  # which nobody has named
        check_named_code(files.read_config(str(config)), str(config))
    return [*(["--config", str(config)] if config else []), "--ckpt_path", name]


def _bands(ranges: report.NormRanges) -> list[report.Band]:
    """Return what the norms can take, at the smallest eps of the layers."""
    from nmlightning.probe.fp16_emulation import fp16_limits

    eps = min(layer.eps for layer in ranges.layers)
    limits = {norm: fp16_limits(norm, eps) for norm in (report.REMEDY, report.FAILING)}
    names = {report.REMEDY: "L1 in half", report.FAILING: "L2 in half, op by op"}
    return [
        report.Band(norm, names[norm], limit.smallest_scale, limit.largest_deviation)
        for norm, limit in limits.items()
    ]
