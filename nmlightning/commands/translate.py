"""`nm translate`: lines of text through a checkpoint."""

import argparse
from pathlib import Path

from nmlightning.commands.argument_parser import ArgumentParser
from nmlightning.errors import InputError


def run(arguments: list[str]) -> int:
    """Run `nm translate` and return its exit code.

    Raises:
        InputError: a checkpoint, an option or a line of text that cannot be right.
    """
    given = _parse(arguments)
    if not given.checkpoint.is_file():
        raise InputError(f"there is no checkpoint {str(given.checkpoint)!r} in {Path.cwd()}.")
    from nmlightning.commands.translating import translate  # torch, which takes seconds

    translate(given)
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="nm translate",
        usage="nm translate CHECKPOINT [--KEY VALUE ...] < SOURCE > TARGET",
        allow_abbrev=False,
        description="Translate the lines of standard input, a sentence each, to standard output, "
        "in their order.",
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="what nm fit has written: a last.ckpt"
    )
    parser.add_argument("--beam_size", type=int, help="1 is greedy (default: the checkpoint's)")
    parser.add_argument(
        "--length_penalty", type=float, help="of the beam search (default: the checkpoint's)"
    )
    parser.add_argument(
        "--tokens_a_batch",
        type=int,
        default=2000,
        help="of the source, with padding (default: %(default)s)",
    )
    parser.add_argument(
        "--max_length",
        type=int,
        default=256,
        help="tokens of a sentence; the rest of a longer one is left out (default: %(default)s)",
    )
    parser.add_argument(
        "--device", help="such as cpu, cuda or cuda:1 (default: cuda if there is one, else cpu)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of weights and activations (default: %(default)s)",
    )
    parser.add_argument(
        "--config", help="a config whose model counts instead of what the checkpoint says"
    )
    return parser.parse_args(arguments)
