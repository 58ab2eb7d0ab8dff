"""`nm translate`: lines of text through a checkpoint."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nmlightning.commands.argument_parser import ArgumentParser, progress_bar
from nmlightning.errors import InputError
from nmlightning.name_patterns import some

if TYPE_CHECKING:
    from nmlightning.translation.task import Translator

LINES_AT_ONCE = 10_000  # sorted by length together, and written together


def run(arguments: list[str]) -> int:
    """Load the checkpoint, then translate what comes by standard input."""
    given = _parse(arguments)
    if not given.checkpoint.is_file():
        raise InputError(f"there is no checkpoint {str(given.checkpoint)!r} in {Path.cwd()}.")
    from nmlightning.commands.failures import filter_logs
    from nmlightning.translation.task import LineOptions, translate_lines

    options = LineOptions(
        given.tokens_a_batch, given.max_length, given.beam_size, given.length_penalty
    )
    with filter_logs():
        task = _load(given)
    if sys.stdin.isatty():
        for line in _read_lines():  # each is answered as it is typed
            _write(translate_lines(task, [line], options)[0])
    else:
        _translate_all(partial(translate_lines, task, options=options), given.max_length)
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="nm translate",
        usage="nm translate CHECKPOINT [--KEY VALUE ...] < SOURCE > TARGET",
        description="Translate the lines of standard input, a sentence each, to standard output, "
        "in their order.",
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="written by nm fit, such as last.ckpt"
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
    parser.add_argument("--config", help="a config whose model replaces that of the checkpoint")
    return parser.parse_args(arguments)


def _load(given: argparse.Namespace) -> "Translator":
    import torch

    from nmlightning.commands.checkpoint import Checkpoint
    from nmlightning.parametrizations.apply import remove_weight_norm
    from nmlightning.parametrizations.layers import normalised_weights
    from nmlightning.translation.task import Translator

    task = Checkpoint(given.checkpoint, given.config).load_module()
    if not isinstance(task, Translator):
        raise InputError(
            f"{str(given.checkpoint)!r} is of {type(task).__name__}, which does not translate."
        )
    if normalised_weights(task):
        remove_weight_norm(task)  # the same weights, without computing them at each token
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return task.eval().to(device, getattr(torch, given.dtype))
    except (RuntimeError, AssertionError) as error:  # torch's two ways to say so
        raise InputError(f"--device {device}: {str(error).split('. ')[0]}.") from error


def _read_lines() -> Iterator[str]:
    from nmlightning.translation.sources import decode_line

    for number, line in enumerate(sys.stdin.buffer, 1):
        yield decode_line(line, number, "the input")


def _translate_all(translate: Callable[..., tuple[list[str], list[int]]], length: int) -> None:
    from nmlightning.commands.run_report import print_notice

    lines = list(_read_lines())
    cut: list[int] = []
    with progress_bar("translating") as progress:
        advance = partial(progress.advance, progress.add_task("", total=len(lines)))
        for start in range(0, len(lines), LINES_AT_ONCE):
            found, cut_here = translate(lines[start : start + LINES_AT_ONCE], on_translated=advance)
            cut += [start + row for row in cut_here]
            _write(found)
    if cut:
        numbers = some([str(row + 1) for row in cut])
        print_notice(
            f"{len(cut)} of {len(lines)} lines have more than {length} tokens, and their ends were "
            f"left out: {numbers}."
        )


def _write(lines: Sequence[str]) -> None:
    text = "".join(line.replace("\n", " ") + "\n" for line in lines)
    sys.stdout.buffer.write(text.encode("utf-8"))
    sys.stdout.buffer.flush()
