"""`nm export`: a checkpoint's network for programs without this package, or without Python."""

import argparse
from pathlib import Path

from nmlightning.commands.argument_parser import ArgumentParser
from nmlightning.errors import InputError, check_choice
from nmlightning.export.formats import FORMATS, check_target


def run(arguments: list[str]) -> int:
    """Run `nm export` and return its exit code.

    Raises:
        InputError: a checkpoint, a format or a file that cannot be right, or a network that is not
            the same afterwards.
    """
    given = _parse(arguments)
    check_choice("--format", given.format, FORMATS)
    _check_checkpoint(given.checkpoint)
    given.output = given.output or given.checkpoint.with_suffix(FORMATS[given.format].suffix)
    check_target(given.output, given.format, given.overwrite)
    from nmlightning.commands.exporting import export  # torch, which takes seconds

    export(given)
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="nm export",
        usage="nm export CHECKPOINT --format FORMAT [--KEY VALUE ...]",
        allow_abbrev=False,
        description="Write the network of a checkpoint with its batch norms folded and its weights "
        "made plain. The file is compared with the checkpoint before it is kept.",
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="what nm fit has written: a last.ckpt"
    )
    parser.add_argument("--format", required=True, help=", ".join(FORMATS))
    parser.add_argument(
        "--output", type=Path, help="the file to write (default: beside the checkpoint)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    parser.add_argument(
        "--no_fold", action="store_true", help="keep batch norms as torch's, to train further"
    )
    parser.add_argument(
        "--input_shape",
        type=_shape,
        help="of one input, such as 3,32,32 (default: what the data of the run says)",
    )
    parser.add_argument(
        "--module", default="net", help="the part of the model to write (default: %(default)s)"
    )
    parser.add_argument(
        "--config",
        help="a config whose model, data or both count instead of what the checkpoint and the "
        "config.yaml of its run say",
    )
    return parser.parse_args(arguments)


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split(",")
    if not all(size.strip().isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"give sizes such as 3,32,32, got {text!r}")
    return tuple(map(int, sizes))


def _check_checkpoint(path: Path) -> None:
    if path.is_dir():
        raise InputError(
            f"{str(path)!r} is a folder; of a sharded checkpoint make a file by python -m "
            "pytorch_lightning.utilities.consolidate_checkpoint."
        )
    if not path.is_file():
        raise InputError(f"there is no file {str(path)!r} in {Path.cwd()}.")
