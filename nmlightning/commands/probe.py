"""`nm probe`: what half precision would make of a network's norms, and few bits of its layers."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nmlightning.commands import files
from nmlightning.commands.argument_parser import ArgumentParser, print_line, print_words
from nmlightning.commands.own_models import is_own_model, parse_shape
from nmlightning.errors import InputError
from nmlightning.named_code import check_named_code
from nmlightning.probe import report
from nmlightning.reports.formatting import show

BITS = (8, 4, 2)
_JSON_MARK = '"generator": "nm probe"'


def run(arguments: list[str]) -> int:
    """Run `nm probe` and return its exit code: 0, whatever the norms would do."""
    given, options = _parse(arguments)
    _check_files(given)
    content: dict[str, Any] = {"generator": "nm probe"}
    ranges: report.NormRanges | InputError
    if given.inference or given.experiment.endswith(".onnx") or is_own_model(given.experiment):
        if given.bits:
            raise InputError("--bits is for training, not for inference: leave it out.")
        from nmlightning.commands.probe_run import run_inference

        ranges, inputs = run_inference(given, options)
        _show(ranges)
        print_line("inputs", inputs)
        content |= {"inputs": inputs, **ranges.as_plain()}
    else:
        if given.inputs or given.input_shape:
            raise InputError("--inputs and --input_shape are for inference: add --inference.")
        words = ["probe", *_experiment(given.experiment, options), *options]
        paths = files.RunPaths(words)  # a misspelt path is reported before torch is imported
        from nmlightning.commands.probe_run import run_batches

        ranges, directions = run_batches(words[1:], paths, given.batches, given.bits or BITS)
        if isinstance(ranges, InputError):
            print_words(str(ranges))
            content |= {"batches": directions.batches, "layers": []}
        else:
            _show(ranges)
            content |= ranges.as_plain()
        if directions.layers:
            print()
            _show(directions)
        content["int8"] = directions.as_plain()
    if not isinstance(ranges, InputError):
        picture = report.draw_ranges(ranges.layers, *_bands(ranges))
        files.write_file("--picture", given.picture, picture)
        print_line("picture", given.picture)
    if given.json:
        text = json.dumps(content, indent=1, allow_nan=False)
        files.write_file("--json", given.json, f"{text}\n")
        print_line("numbers", given.json)
    return 0


def _check_files(given: argparse.Namespace) -> None:
    """Raise InputError for files that cannot be written, before anything is measured."""
    files.check_replaceable("--picture", given.picture, report.GENERATOR, "picture of nm probe")
    if given.json:
        files.check_replaceable("--json", given.json, _JSON_MARK, "answer of nm probe")
        if given.json.resolve() == given.picture.resolve():
            raise InputError("--json and --picture name the same file: give two.")


def _show(found: Any) -> None:
    show(found.table())
    print_words(found.describe())


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return what is given, and the options that are those of `nm fit`."""
    parser = ArgumentParser(
        prog="nm probe",
        usage="nm probe CONFIG|CHECKPOINT|FILE.onnx|MODULE:NAME [--batches N] [--inference] "
        "[--inputs FILE] [--input_shape S ...] [--bits B ...] [--picture FILE] [--json FILE] "
        "[--KEY VALUE ...]",
        description="Run some training batches through a network, change nothing, and report for "
        "each norm layer the range of its inputs and what L2, L1, L∞, Top(10) and range would make "
        "of them with every value in float16, and for each convolution and linear layer how far "
        "8 bits or fewer would turn its input, its weight and its gradient. Of an ONNX file or a "
        "module of your own, or by --inference of a run, what inference in float16 and bfloat16 "
        "would make of each norm.",
        epilog="Every other option is one of nm fit, such as --data Digits; in the inference of a "
        "file, a module or a checkpoint only those of --data are taken.",
    )
    parser.add_argument(
        "experiment",
        metavar="CONFIG|CHECKPOINT|FILE.onnx|MODULE:NAME",
        help="a config; a checkpoint of a run, whose config.yaml is found beside it or given by "
        "--config; an ONNX file; a torch module or what returns one, as my.package:make_model",
    )
    parser.add_argument(
        "--inference",
        action="store_true",
        help="measure validation in place of training, as of a file or module",
    )
    parser.add_argument(
        "--inputs", type=Path, help="an .npz of the model's inputs, by name or in order"
    )
    parser.add_argument(
        "--input_shape",
        type=parse_shape,
        nargs="+",
        metavar="S",
        help="of one sample of each input, such as 3,32,32, to draw random ones",
    )
    parser.add_argument("--batches", type=int, default=2, help="how many (default: %(default)s)")
    parser.add_argument(
        "--bits",
        type=int,
        nargs="+",
        choices=range(2, 9),
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
    if not files.is_checkpoint(name):
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

    names = {report.REMEDY: "L1 in half", report.FAILING: "L2 in half, op by op"}
    if ranges.failing != report.FAILING:
        squares = any("float16_sums" in layer.outcomes for layer in ranges.layers)
        names = {"scaled": "scaled in float16"} if squares else {"folded": "folded in float16"}
        names["float16"] = "float16 op by op"
    eps = min(layer.eps for layer in ranges.layers)
    limits = {norm: fp16_limits(norm, eps) for norm in names}
    return [
        report.Band(norm, names[norm], limit.smallest_scale, limit.largest_deviation)
        for norm, limit in limits.items()
    ]
