"""Swaps the norms of every model of public zoos, trains a step, reverts the swap and exports.

    python benchmarks/zoo.py [--rows zoo.jsonl] [--only 'timm/resnet*'] [--seconds 300]
    python benchmarks/zoo.py --write docs/compatibility.md    # the tables of what there is

A line of the file of rows is an architecture; those that are there are not tried again. The order
is shuffled, the same each time, so that what is there after an interrupted sweep is a fair sample.
Each is tried in a process of its own, on one thread, with limits of time and memory.
"""

import argparse
import copy
import fnmatch
import itertools
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from zoo_models import Case, TooLarge, build, build_without_values, list_zoos
from zoo_tables import write_tables

from nmlightning import SwapReport, swap_norms
from nmlightning.errors import InputError
from nmlightning.export.fold import fold_norms
from nmlightning.surgery.norm_layers import find_norm_layers

KINDS = ("batch", "layer", "rms")
MEMORY = 12 * 2**30  # bytes of address space
TOLERANCE = 1e-4  # of the largest output, for a network whose norms are folded or that is exported

Row = dict[str, Any]


def main() -> None:
    """Try what has no row yet, or write the tables."""
    sweep(list_zoos(), try_architecture, write_tables, "zoo.jsonl", _warm_up)


def sweep(
    zoos: Mapping[str, Iterable[str]],
    work: Callable[[str, str, Row], None],
    write: Callable[[Path, list[Row], Mapping[str, int]], None],
    rows: str,
    warm_up: Callable[[], None] = lambda: None,
) -> None:
    """Try in processes what has no row in a file yet, or write the tables, as the command says.

    `work` fills the row of a zoo and a name; `write` takes the page, the rows and all counts.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--rows", type=Path, default=Path(rows))
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns on zoo/name")
    parser.add_argument("--seconds", type=float, default=300, help="the limit of each")
    parser.add_argument("--write", type=Path, help="write the tables into this page and stop")
    options = parser.parse_args()
    zoos = {zoo: list(names) for zoo, names in zoos.items()}
    known = read_rows(options.rows)
    if options.write is not None:
        write(options.write, known, {zoo: len(names) for zoo, names in zoos.items()})
        return
    torch.set_num_threads(1)
    warm_up()
    shuffled = {zoo: random.Random(0).sample(names, len(names)) for zoo, names in zoos.items()}
    turns = itertools.zip_longest(*shuffled.values())  # each of the zoos in turn
    todo = [(zoo, x) for turn in turns for zoo, x in zip(zoos, turn, strict=True) if x is not None]
    done = {(row["zoo"], row["name"]) for row in known}
    for zoo, name in todo:
        if (zoo, name) not in done and _matches(f"{zoo}/{name}", options.only):
            row = try_in_process(work, zoo, name, options.seconds)
            with options.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def read_rows(file: Path) -> list[Row]:
    """Return the rows that are there, without one that was cut off."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _warm_up() -> None:
    """Import once, for all processes, what exporting and swapping import when they are called."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).eval()
    swap_norms(net)
    torch.export.export(net, (torch.ones(2, 1, 2, 2),))
    fold_norms(net)


def try_in_process(
    work: Callable[[str, str, Row], None], zoo: str, name: str, seconds: float
) -> Row:
    """Return the row that `work` fills, also where its process ends without one."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, work, zoo, name))
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fork of threads that only torch has
        process.start()
    sender.close()
    try:
        row = receiver.recv() if receiver.poll(seconds) else {"failed": f"over {seconds:.0f} s"}
    except EOFError:
        row = {"failed": "the process died"}
    os.killpg(process.pid, signal.SIGKILL)  # with the ranks that it may have started
    process.join()
    return {"zoo": zoo, "name": name, "took": round(time.monotonic() - start, 1), **row}


def _work(sender: Connection, work: Callable[[str, str, Row], None], zoo: str, name: str) -> None:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    warnings.simplefilter("ignore")
    row: Row = {}
    try:
        work(zoo, name, row)
    except Exception as error:
        row["failed"] = first_words(error)
    sender.send(row)


def try_architecture(zoo: str, name: str, row: Row) -> None:
    """Build it and try it."""
    try:
        case = build(zoo, name)
    except TooLarge:
        row["too_large"] = True
        try_without_values(build_without_values(zoo, name), row)
    except Exception as error:
        row["unbuilt"] = first_words(error)
    else:
        try_case(case, row)


def first_words(error: BaseException) -> str:
    """Return what an error says on its first line."""
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:160]}"


def try_case(case: Case, row: Row) -> None:
    """Put into the row what became of each stage; what fails without a swap, too, says so."""
    model, original = case.model.eval(), copy.deepcopy(case.model).eval()
    reference = outputs_of(original, case)
    report = try_swap(model, row)
    if report is None:
        return
    if all("BatchNorm" in swap.before for swap in report.swapped):
        row["evaluates"] = same_bits(outputs_of(model, case), reference)
    names = [swap.name for swap in report.swapped]
    row["step"] = take_step(model, case, names)
    if row["step"] != "done" and take_step(copy.deepcopy(original), case, names) == row["step"]:
        row["step"] = f"as without a swap: {row['step']}"
    model.eval()
    row["export"] = try_export(model, original, case)
    if any("BatchNorm" in swap.before for swap in report.swapped):
        row["fold"] = try_fold(model, original, case)
    row["reverted"] = revert(model, original, case)


def try_swap(model: nn.Module, row: Row) -> SwapReport | None:
    """Swap all norms, and put into the row which were swapped and left; None if it is refused."""
    try:
        report = swap_norms(model, "l1", kinds=KINDS)
    except InputError as refusal:
        layers = find_norm_layers(model)
        row["refused"] = "only norms without a swap" if layers else "no norm layers"
        if any(layer.kind for layer in layers):
            row["refused"] = first_words(refusal)
        row["left"] = dict(Counter(f"{x.type_name}: {x.unsupported_reason}" for x in layers))
        return None
    row["swapped"] = dict(Counter(f"{swap.before} → {swap.after}" for swap in report.swapped))
    row["left"] = dict(Counter(f"{swap.before}: {swap.reason}" for swap in report.left))
    return report


def try_without_values(model: nn.Module, row: Row) -> None:
    """Swap one that is too large to run, and revert that: names, shapes and classes stay."""

    def describe() -> list[Any]:
        return [(name, q.shape, q.dtype) for name, q in model.state_dict().items()]

    state, classes = describe(), [type(module) for module in model.modules()]
    if try_swap(model, row) is not None:
        row["meta"] = "done" if describe() == state else "another state"
        swap_norms(model, "l2", kinds=KINDS)
        if classes != [type(module) for module in model.modules()] or describe() != state:
            row["meta"] = "not reverted"


def outputs_of(model: nn.Module, case: Case) -> list[Tensor]:
    """Return the tensors that a model gives, with the same random numbers each time."""
    torch.manual_seed(1)
    with torch.no_grad():
        outputs = model(*case.arguments, **case.keywords)
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def with_weights(original: nn.Module, model: nn.Module) -> nn.Module:
    """Give a network another's weights and return it, in evaluation.

    Training mode drops what some networks of timm keep of their weights for evaluation.
    """
    original.load_state_dict(model.state_dict())
    return original.train().eval()


def same_bits(outputs: list[Tensor], expected: list[Tensor]) -> bool:
    """Return whether two evaluations gave the same, NaNs included."""
    return len(outputs) == len(expected) and all(
        a.shape == b.shape and torch.allclose(a, b, 0, 0, equal_nan=True)
        for a, b in zip(outputs, expected, strict=True)
    )


def are_close(outputs: list[Tensor], expected: list[Tensor]) -> bool:
    """Return whether all differ by no more than TOLERANCE of the largest."""
    return len(outputs) == len(expected) and all(
        a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * b.abs().max())
        for a, b in zip(outputs, expected, strict=True)
        if b.numel() and b.is_floating_point()
    )


def take_step(model: nn.Module, case: Case, norms: list[str]) -> str:
    """Train by one step of SGD on a random linear loss; return "done", or what was wrong."""
    model.train()
    torch.manual_seed(2)
    arguments = case.arguments if case.training_arguments is None else case.training_arguments
    try:
        outputs = tree_leaves(model(*arguments, **case.keywords))
        learned = [y for y in outputs if isinstance(y, Tensor) and y.requires_grad]
        loss = sum((y.float() * torch.randn_like(y.float())).mean() for y in learned)
        loss.backward()
    except Exception as error:
        return first_words(error)
    if not loss.isfinite():
        return "the loss is not finite"
    parameters = {name: list(model.get_submodule(name).parameters(recurse=False)) for name in norms}
    unseen = [
        n for n, qs in parameters.items() if any(q.grad is None for q in qs if q.requires_grad)
    ]
    if unseen:
        return f"without gradients: {len(unseen)} norms such as {unseen[0]}"
    if not all(q.grad.isfinite().all() for q in model.parameters() if q.grad is not None):
        return "a gradient is not finite"
    torch.optim.SGD(model.parameters(), 1e-4).step()
    return "done"


def try_export(model: nn.Module, original: nn.Module, case: Case) -> str:
    """Export by torch.export and compare; return "done", or why not."""
    try:
        program = torch.export.export(model, case.arguments, case.keywords, strict=False)
        outputs = outputs_of(program.module(), case)
    except Exception as error:
        try:
            torch.export.export(original, case.arguments, case.keywords, strict=False)
        except Exception as without:
            return f"as without a swap: {type(without).__name__}"
        return first_words(error)
    return "done" if are_close(outputs, outputs_of(model, case)) else "other outputs"


def try_fold(model: nn.Module, original: nn.Module, case: Case) -> str:
    """Fold the batch norms of copies, swapped and not; return how many, or what was wrong."""
    folded, plain = copy.deepcopy(model), with_weights(copy.deepcopy(original), model)
    report, expected = fold_norms(folded), len(fold_norms(plain))
    if len(report) != expected:
        return f"{len(report)} folded, {expected} without a swap"
    outputs = outputs_of(folded, case)
    # A deep network may enlarge what folding rounds, swapped or not.
    if not (
        are_close(outputs, outputs_of(model, case)) or same_bits(outputs, outputs_of(plain, case))
    ):
        return "other outputs"
    return f"done: {len(report)} of {len(report) + len(report.left)}"


def revert(model: nn.Module, original: nn.Module, case: Case) -> str:
    """Swap back; return "done" if the model then is the original with the trained weights."""
    swap_norms(model, "l2", kinds=KINDS)
    changed = [
        f"{type(b).__name__} became {type(a).__name__}"
        for a, b in zip(model.modules(), original.modules(), strict=True)
        if type(a) is not type(b)
    ]
    if changed:
        return changed[0]
    expected = outputs_of(with_weights(original, model), case)
    return "done" if same_bits(outputs_of(model, case), expected) else "other bits"


if __name__ == "__main__":
    main()
