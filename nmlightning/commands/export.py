"""`nm export`: writes a checkpoint's network for programs without this package or Python."""

import argparse
import re
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
        usage="nm export CHECKPOINT --format FORMAT [--KEY VALUE ...]",
        description="Write the network of a checkpoint with its batch norms folded and its weights "
        "made plain. The file is first compared with the checkpoint.",
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="written by nm fit, such as last.ckpt"
    )
    parser.add_argument("--format", required=True, help=", ".join(FORMATS))
    parser.add_argument(
        "--output", type=Path, help="the file to write (default: beside the checkpoint)"
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
    return parser.parse_args(arguments)


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
