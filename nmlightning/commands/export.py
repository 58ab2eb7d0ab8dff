"""`nm export`: writes a checkpoint's network for programs without this package or Python."""

import argparse
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, cast

from nmlightning.commands.argument_parser import ArgumentParser, print_line
from nmlightning.commands.own_models import (
    bind_inputs,
    is_own_model,
    load_model,
    parse_shape,
    read_arrays,
)
from nmlightning.errors import InputError, check_choice, nearest
from nmlightning.export.formats import FORMATS, HALF_SAFE, check_target, file_size
from nmlightning.name_patterns import by_reason, some

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from pytorch_lightning import LightningModule
    from torch import nn

    from nmlightning.commands.checkpoint import Checkpoint
    from nmlightning.export.export import ExportReport
    from nmlightning.export.half_safe import HalfSafe
    from nmlightning.translation.task import Translator


def run(arguments: list[str]) -> int:
    given = _parse(arguments)
    check_choice("--format", given.format, FORMATS)
    model = str(given.checkpoint)
    is_own = is_own_model(model)
    if not is_own:
        _check_file(given.checkpoint)
    if given.inputs and given.input_shape:
        raise InputError("--inputs says the shapes, too: leave --input_shape out.")
    if given.checkpoint.suffix == ".onnx":
        _refuse(given, "an ONNX file", "no_fold", "module", "config")
        return _rewrite(given)
    if is_own:
        _refuse(given, f"what {model} makes", "config")
    if given.half_safe and FORMATS[given.format].keeps_code:
        raise InputError(
            "a state dict has no norms for --half-safe to swap: give --format onnx or torch_export."
        )
    name = Path(model.rpartition(":")[2]) if is_own else given.checkpoint
    given.output = given.output or name.with_suffix(FORMATS[given.format].suffix)
    check_target(given.output, given.format, given.overwrite)
    arrays = read_arrays(given.inputs) if given.inputs else None
    from nmlightning.commands.checkpoint import Checkpoint
    from nmlightning.commands.failures import filter_logs
    from nmlightning.translation.task import Translator

    with filter_logs():
        checkpoint = None if is_own else Checkpoint(given.checkpoint, given.config)
        module = load_model(model) if checkpoint is None else checkpoint.load_module()
        if isinstance(module, Translator):
            _refuse(given, "a translator", "inputs", "module", "no_fold")
            return _export_translator(module, given, checkpoint)
        return _export_module(module, given, checkpoint, arrays)


def _check_file(checkpoint: Path) -> None:
    if re.match(r"\w+:/", str(checkpoint)):
        raise InputError(f"nm export takes a file, not an address: download {checkpoint}.")
    if checkpoint.suffix == ".onnx":  # its reader says it
        return
    if checkpoint.is_dir():
        raise InputError(
            f"{str(checkpoint)!r} is a folder; of a sharded checkpoint make a file by "
            "python -m pytorch_lightning.utilities.consolidate_checkpoint."
        )
    if not checkpoint.is_file():
        raise InputError(f"there is no file {str(checkpoint)!r} in {Path.cwd()}.")


def _refuse(given: argparse.Namespace, what: str, *options: str) -> None:
    """Raise InputError for an option that would change nothing."""
    if unused := [f"--{name}" for name in options if getattr(given, name)]:
        raise InputError(f"{some(unused)} would change nothing of {what}: leave it out.")


def _export_module(
    module: "nn.Module",
    given: argparse.Namespace,
    checkpoint: "Checkpoint | None",
    arrays: "dict[str, NDArray[np.generic]] | None",
) -> int:
    """Write a part of a module, by default a checkpoint's `net`."""
    from nmlightning.export.export import export_network

    name = given.module or ("net" if checkpoint else "")
    net = _choose(module, name) if name else module
    shape, evaluate = given.input_shape, None
    if not (shape or arrays):
        if checkpoint is None:
            raise InputError("give --input_shape, such as 3,32,32, or --inputs x.npz.")
        shape = checkpoint.input_shape()
    if given.half_safe == "l1" and not arrays:
        whole = cast("LightningModule", module)
        evaluate = checkpoint.evaluation(whole, name) if checkpoint else None
        if evaluate is None:
            raise InputError("--half-safe l1 is fitted on batches: give --inputs x.npz.")
    report = export_network(
        net,
        given.output,
        given.format,
        shape,
        inputs=bind_inputs(net, arrays) if arrays else None,
        half_safe=given.half_safe,
        evaluate=evaluate,
        fold=not given.no_fold,
        overwrite=given.overwrite,
    )
    _print(report, type(net).__name__, given.inputs)
    return 0


def _export_translator(
    task: "Translator", given: argparse.Namespace, checkpoint: "Checkpoint | None"
) -> int:
    """Write the encoder and the greedy step of a translation network, each as a graph."""
    from nmlightning.parametrizations.apply import remove_weight_norm
    from nmlightning.parametrizations.layers import normalised_weights
    from nmlightning.translation.graphs import export_translator

    net, evaluate = task.net.float().eval(), None
    if normalised_weights(net):
        remove_weight_norm(net)
    if given.half_safe == "l1":
        evaluate = checkpoint.evaluation(task, "net") if checkpoint else None
        if evaluate is None:
            raise InputError("--half-safe l1 is fitted on batches: give data by --config.")
    shape = given.input_shape or (None,)
    reports = export_translator(
        net,
        given.output,
        given.format,
        source_length=shape[0],
        extra_length=task.extra_length,
        half_safe=given.half_safe,
        evaluate=evaluate,
        overwrite=given.overwrite,
    )
    for report, part in zip(reports, ("Encoder", "Step"), strict=True):
        _print(report, f"{part} of {type(net).__name__}")
    print_line(
        "decode",
        "begin with token 1 and a cache of 0 tokens (an LSTM: zeros); feed each step the likeliest "
        "token but 0 and 1, and new_…; 2 ends. These are the tokens of nm translate --beam_size 1",
    )
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="nm export",
        usage="nm export CHECKPOINT|MODULE:NAME --format FORMAT [--KEY VALUE ...]\n"
        "       nm export FILE.onnx --half-safe scaled [-o FILE] [--inputs FILE]",
        description="Write the network of a checkpoint, or that my.package:make_model returns, "
        "with its batch norms folded and its weights made plain. The file is first compared with "
        "it.",
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="written by nm fit, such as last.ckpt, or my.package:make_model, or an ONNX file",
    )
    parser.add_argument("--format", help=f"{', '.join(FORMATS)} (required for a checkpoint)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="the file (default: beside CHECKPOINT, of MODULE in this folder)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument("--no_fold", action="store_true", help="keep batch norms, to train further")
    parser.add_argument(
        "--input_shape",
        type=parse_shape,
        help="of one input, such as 3,32,32 (default: from the data of the run)",
    )
    parser.add_argument("--inputs", type=Path, help="an .npz of them, by name or in order")
    parser.add_argument(
        "--half-safe",
        "--half_safe",
        metavar="HOW",
        choices=HALF_SAFE,
        help="swap layer and RMS norms for float16: scaled computes the same, l1 is fitted to it "
        "(of an ONNX file scaled alone)",
    )
    parser.add_argument("--module", help="the part to write (default: net, of a checkpoint)")
    parser.add_argument("--config", help="whose model and data replace the checkpoint's")
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
    if given.half_safe is None or given.format != "onnx":
        wrong = "--half-safe is missing" if given.format == "onnx" else f"--format {given.format}"
        raise InputError(
            f"{wrong}: of an ONNX file norms are rewritten, by nm export {file} --half-safe scaled."
        )
    output = given.output or given.checkpoint.with_stem(f"{given.checkpoint.stem}_half_safe")
    check_target(output, "onnx", given.overwrite)
    from nmlightning.export.half_safe_onnx import make_half_safe

    inputs = read_arrays(given.inputs) if given.inputs else None
    shapes = [given.input_shape] if given.input_shape else ()
    report = make_half_safe(given.checkpoint, output, inputs, shapes)
    counts = Counter("RMS" if x.kind == "rms" else x.kind for x in report.rewritten)
    found = [f"{count} {kind} norm{'s' * (count > 1)}" for kind, count in counts.items()]
    print_line("rewritten", ", ".join(found))
    for line in by_reason(report.left):
        print_line("left", line)
    print_line("error", f"{report.error:.1e} of a norm's largest output, against float64")
    difference, how = report.difference, given.inputs or "random inputs"
    if isinstance(difference, float):
        difference = f"{difference:.1e} of the largest output ({how}, onnxruntime)"
    print_line("difference", difference)
    data = f", with weights in {some(report.data)} beside it" if report.data else ""
    print_line("file", f"{report.file} ({file_size(report.size)}{data})")
    print_line("use", f"onnxruntime.InferenceSession({str(report.file)!r})")
    return 0


def _choose(module: "nn.Module", name: str) -> "nn.Module":
    parts: dict[str, nn.Module] = dict(module.named_modules())
    if not name or name not in parts:
        children = [child for child, _ in module.named_children()]
        raise InputError(
            f"--module: {type(module).__name__} has no module {name!r}; it has {some(children)}."
            f"{nearest(name, parts)}"
        )
    return parts[name]


def _print(report: "ExportReport", network: str, inputs: Path | None = None) -> None:
    from nmlightning.export.examples import BATCH_SIZES

    print_line("network", f"{network}, inputs {report.inputs}")
    if report.fixed:
        print_line("sequence", f"of this length only: {report.fixed}")
    print_line("file", f"{report.file} ({report.format}, {file_size(report.size)})")
    _print_norms(report)
    if report.made_plain:
        print_line("weights", f"{len(report.made_plain)} no longer parametrized")
    if report.quantized:
        print_line("int8", f"{len(report.quantized)} inputs quantised, weights in the file as int8")
    _print_half_safe(report.half_safe)
    print_line(
        "difference",
        f"{report.difference:.1e} of the largest output, at most {report.tolerance:.0e} "
        f"({inputs or 'random inputs'}, batches of {', '.join(map(str, BATCH_SIZES))})",
    )
    names = [x if x != "input" else "x" for x in report.input_names]
    feed = ", ".join(f"{x!r}: {y}.numpy()" for x, y in zip(report.input_names, names, strict=True))
    use = FORMATS[report.format].use
    print_line("use", use.format(file=str(report.file), feed=feed, names=", ".join(names)))


def _print_half_safe(safe: "HalfSafe | None") -> None:
    if safe is None:
        return
    print_line("half-safe", f"{len(safe.swapped)} layer and RMS norms swapped to {safe.norm}")
    print_line("change", f"{safe.change:.1e} of the largest output")
    for metric, (before, after) in safe.metrics.items():
        print_line("", f"{metric} {before:.4g} before, {after:.4g} after")
    for line in by_reason(safe.left):
        print_line("not swapped", line)


def _print_norms(report: "ExportReport") -> None:
    if report.fold is None:
        print_line("batch norms", "none folded (--no_fold)")
        return
    if not (report.fold.folded or report.fold.left):
        return
    folded = f"{len(report.fold)} folded into the layers before them"
    if FORMATS[report.format].keeps_code and len(report.fold):
        folded += "; each stays as a shift, to keep its keys (--no_fold to train further)"
    print_line("batch norms", folded)
    for line in by_reason({left.norm: left.reason for left in report.fold.left}):
        print_line("not folded", line)
