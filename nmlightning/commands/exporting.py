"""What `nm export` does once its options are known to be right, and what it prints."""

import argparse

from pytorch_lightning import LightningModule
from rich.console import Console
from torch import nn

from nmlightning.commands.quiet import quiet
from nmlightning.commands.saved_module import SavedModule
from nmlightning.errors import InputError, nearest
from nmlightning.export.agreement import BATCH_SIZES, TOLERANCE
from nmlightning.export.formats import FORMATS
from nmlightning.export.network import ExportReport, export_network
from nmlightning.name_patterns import some
from nmlightning.tasks.translation import Translator


def export(given: argparse.Namespace) -> None:
    """Load, write and report.

    Raises:
        InputError: a checkpoint that cannot be right, or a network that is not the same afterwards.
    """
    with quiet():
        saved = SavedModule(given.checkpoint, given.config)
        module = saved.load()
        if isinstance(module, Translator):
            raise InputError(
                f"{str(given.checkpoint)!r} is of Translator, whose network has two inputs and "
                "writes token by token, which nm export does not write: nm translate runs it."
            )
        shape = given.input_shape or saved.input_shape()
        net = _choose(module, given.module)
        report = export_network(
            net,
            given.output,
            given.format,
            shape,
            fold=not given.no_fold,
            overwrite=given.overwrite,
        )
    _print(report, type(net).__name__, shape)


def _choose(module: LightningModule, name: str) -> nn.Module:
    parts: dict[str, nn.Module] = dict(module.named_modules())
    if not name or name not in parts:
        children = [child for child, _ in module.named_children()]
        raise InputError(
            f"--module: {type(module).__name__} has no module {name!r}; it has {some(children)}."
            f"{nearest(name, parts)}"
        )
    return parts[name]


def _print(report: ExportReport, network: str, shape: tuple[int, ...]) -> None:
    sizes = " × ".join(map(str, ("N", *shape)))
    _print_line("network", f"{network}, inputs {sizes}")
    _print_line("file", f"{report.file} ({report.format}, {report.size / 1e6:.1f} MB)")
    _print_norms(report)
    if report.made_plain:
        _print_line("weights", f"{len(report.made_plain)} no longer parametrized")
    _print_line(
        "difference",
        f"{report.difference:.1e} of the largest output, at most {TOLERANCE:.0e} "
        f"(random inputs, batches of {', '.join(map(str, BATCH_SIZES))})",
    )
    _print_line("use", FORMATS[report.format].use.format(file=str(report.file)))


def _print_norms(report: ExportReport) -> None:
    if report.fold is None:
        _print_line("batch norms", "none folded, as asked")
        return
    folded = f"{len(report.fold)} folded into the layers before them"
    if FORMATS[report.format].keeps_code and len(report.fold):
        folded += "; each stays as a shift, so that the keys do (--no_fold to train further)"
    _print_line("batch norms", folded)
    reasons: dict[str, list[str]] = {}
    for left in report.fold.left:
        reasons.setdefault(left.reason, []).append(left.norm)
    for reason, names in reasons.items():
        _print_line("", f"{len(names)} left, {reason}: {some(names, 3)}")


def _print_line(heading: str, text: str) -> None:
    Console().print(f" {heading:<11} {text}", soft_wrap=True, highlight=False, markup=False)
