"""`nm export`: writes a checkpoint's network for programs without this package or Python."""

import argparse
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from nmlightning.commands.argument_parser import ArgumentParser, print_line
from nmlightning.commands.own_models import parse_shape
from nmlightning.errors import InputError, check_choice, nearest
from nmlightning.export.formats import FORMATS, check_target
from nmlightning.name_patterns import by_reason, some

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule
    from torch import nn

    from nmlightning.export.export import ExportReport


def run(arguments: list[str]) -> int:
    given = _parse(arguments)
    check_choice("--format", given.format, FORMATS)
    if re.match(r"\w+:/", str(given.checkpoint)):
        raise InputError(f"nm export takes a file, not an address: download {given.checkpoint}.")
    if given.checkpoint.is_dir():
        raise InputError(
            f"{str(given.checkpoint)!r} is a folder; of a sharded checkpoint make a file by "
            "python -m pytorch_lightning.utilities.consolidate_checkpoint."
        )
    if not given.checkpoint.is_file():
        raise InputError(f"there is no file {str(given.checkpoint)!r} in {Path.cwd()}.")
    if given.checkpoint.suffix == ".onnx":
        return _rewrite(given)
    if given.half_safe or given.inputs:
        raise InputError("--half-safe and --inputs are for ONNX files.")
    given.output = given.output or given.checkpoint.with_suffix(FORMATS[given.format].suffix)
    check_target(given.output, given.format, given.overwrite)
    from nmlightning.commands.checkpoint import Checkpoint
    from nmlightning.commands.failures import filter_logs
    from nmlightning.export.export import export_network
    from nmlightning.translation.task import Translator

    with filter_logs():
        checkpoint = Checkpoint(given.checkpoint, given.config)
        module = checkpoint.load_module()
        if isinstance(module, Translator):
            raise InputError(
                f"{str(given.checkpoint)!r} is of Translator, whose network takes two inputs: nm "
                "export cannot write it. Run it with nm translate."
            )
        shape = given.input_shape or checkpoint.input_shape()
        net = _choose(module, given.module)
        fold, overwrite = not given.no_fold, given.overwrite
        report = export_network(
            net, given.output, given.format, shape, fold=fold, overwrite=overwrite
        )
    _print(report, type(net).__name__, shape)
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="nm export",
        usage="nm export CHECKPOINT --format FORMAT [--KEY VALUE ...]\n"
        "       nm export FILE.onnx --half-safe scaled [-o FILE] [--inputs FILE]",
        description="Write the network of a checkpoint with its batch norms folded and its weights "
        "made plain. The file is first compared with the checkpoint.",
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="written by nm fit, such as last.ckpt; or an ONNX file of any network",
    )
    parser.add_argument("--format", help=f"{', '.join(FORMATS)} (required for a checkpoint)")
    parser.add_argument(
        "-o", "--output", type=Path, help="the file to write (default: beside the checkpoint)"
    )
    parser.add_argument(
        "--half-safe",
        metavar="HOW",
        help="scaled: of an ONNX file, rewrite layer and RMS norms so that float16 holds what they "
        "compute",
    )
    parser.add_argument(
        "--inputs",
        type=Path,
        help="an .npz of an ONNX file's inputs, to compare it with what is "
        "written (default: random, if it says their shapes)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument(
        "--no_fold", action="store_true", help="keep batch norms as torch's, to train further"
    )
    parser.add_argument(
        "--input_shape",
        type=parse_shape,
        help="of one input, such as 3,32,32 (default: from the data of the run)",
    )
    parser.add_argument(
        "--module", default="net", help="the part of the model to write (default: %(default)s)"
    )
    parser.add_argument(
        "--config", help="a config whose model and data replace those of the checkpoint and its run"
    )
    given = parser.parse_args(arguments)
    if given.format is None and given.checkpoint.suffix != ".onnx":
        parser.error("the following arguments are required: --format")
    given.format = given.format or "onnx"
    return given


def _rewrite(given: argparse.Namespace) -> int:
    """Write an ONNX file again with norms that float16 holds."""
    file = str(given.checkpoint)
    if given.half_safe == "l1":
        raise InputError(
            "--half-safe l1 needs the model's source and data, which an ONNX file does not have: "
            "nm export my.package:make_model --half-safe l1; the file itself takes scaled."
        )
    if given.half_safe != "scaled" or given.format != "onnx":
        raise InputError(
            f"of an ONNX file norms are rewritten: nm export {file} --half-safe scaled."
        )
    output = given.output or given.checkpoint.with_stem(f"{given.checkpoint.stem}_half_safe")
    check_target(output, "onnx", given.overwrite)
    from nmlightning.commands.own_models import read_arrays
    from nmlightning.export.half_safe_onnx import make_half_safe

    inputs = read_arrays(given.inputs) if given.inputs else None
    report = make_half_safe(given.checkpoint, output, inputs)
    counts = Counter("RMS" if x.kind == "rms" else x.kind for x in report.rewritten)
    print_line("rewritten", ", ".join(f"{count} {kind} norms" for kind, count in counts.items()))
    for line in by_reason(report.left):
        print_line("left", line)
    print_line("error", f"{report.error:.1e} of a norm's largest output, against float64")
    difference, how = report.difference, given.inputs or "random inputs"
    if isinstance(difference, float):
        difference = f"{difference:.1e} of the largest output ({how}, onnxruntime)"
    print_line("difference", difference)
    data = f", with weights in {some(report.data)} beside it" if report.data else ""
    print_line("file", f"{report.file} ({report.size / 1e6:.1f} MB{data})")
    print_line("use", f"onnxruntime.InferenceSession({str(report.file)!r})")
    return 0


def _choose(module: "LightningModule", name: str) -> "nn.Module":
    parts: dict[str, nn.Module] = dict(module.named_modules())
    if not name or name not in parts:
        children = [child for child, _ in module.named_children()]
        raise InputError(
            f"--module: {type(module).__name__} has no module {name!r}; it has {some(children)}."
            f"{nearest(name, parts)}"
        )
    return parts[name]


def _print(report: "ExportReport", network: str, shape: tuple[int, ...]) -> None:
    from nmlightning.export.export import BATCH_SIZES

    sizes = " × ".join(map(str, ("N", *shape)))
    print_line("network", f"{network}, inputs {sizes}")
    print_line("file", f"{report.file} ({report.format}, {report.size / 1e6:.1f} MB)")
    _print_norms(report)
    if report.made_plain:
        print_line("weights", f"{len(report.made_plain)} no longer parametrized")
    if report.quantized:
        print_line("int8", f"{len(report.quantized)} inputs quantised, weights in the file as int8")
    print_line(
        "difference",
        f"{report.difference:.1e} of the largest output, at most {report.tolerance:.0e} "
        f"(random inputs, batches of {', '.join(map(str, BATCH_SIZES))})",
    )
    print_line("use", FORMATS[report.format].use.format(file=str(report.file)))


def _print_norms(report: "ExportReport") -> None:
    if report.fold is None:
        print_line("batch norms", "none folded (--no_fold)")
        return
    folded = f"{len(report.fold)} folded into the layers before them"
    if FORMATS[report.format].keeps_code and len(report.fold):
        folded += "; each stays as a shift, to keep its keys (--no_fold to train further)"
    print_line("batch norms", folded)
    for line in by_reason({left.norm: left.reason for left in report.fold.left}):
        print_line("not folded", line)
