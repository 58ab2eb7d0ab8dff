"""`nm compare`: a table and a page of what differs between runs, and of how well each did."""

import argparse
from pathlib import Path

import numpy as np

from nmlightning.commands.argument_parser import ArgumentParser, print_line
from nmlightning.commands.files import check_replaceable, write_file
from nmlightning.errors import InputError
from nmlightning.reports import comparison
from nmlightning.reports.formatting import Grid, show
from nmlightning.reports.page import GENERATOR, write_page
from nmlightning.reports.run import read_runs


@np.errstate(all="ignore")  # of what has diverged
def run(arguments: list[str]) -> int:
    given = _parse(arguments)
    check_replaceable("--report", given.report, GENERATOR, "page of nm compare")
    readable, left_out = read_runs(given.run)
    runs, unmeasured = comparison.leave_out_unmeasured(
        comparison.join_resumed(readable), given.metric
    )
    left_out |= unmeasured
    if not runs:
        raise InputError(next(iter(left_out.values())))
    metric = comparison.choose_metric(runs, given.metric)
    groups = comparison.group_runs(runs, metric)
    _print_tables(groups)
    resumed = comparison.find_resumed(readable)
    for part in (part for joined in runs for part in joined.parts):
        if (earlier := resumed[part]) is not None:
            print_line("resumed", f"{part} resumes {earlier.folder}; they are one run")
    for reason in left_out.values():
        print_line("left out", " ".join(reason.split()))
    for file in (file for each in readable for file in each.cut_off):
        print_line("left out", f"{file} is cut off within its last line, which does not count.")
    page = write_page(groups, given.report.parent)
    write_file("--report", given.report, page)
    print_line("page", f"{given.report}, {len(page) / 1e6:.1f} MB, which needs no network")
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="nm compare",
        description="Print a table of runs, grouped by their settings, with mean and deviation "
        "over seeds, and write a page with their curves, norms and correction factors.",
    )
    parser.add_argument(
        "run", nargs="+", help="a run's folder, or one with runs below it, such as runs"
    )
    parser.add_argument("--metric", help="a logged number (default: an accuracy in validation)")
    parser.add_argument(
        "--report",
        type=Path,
        default=Path("comparison.html"),
        help="the page to write (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def _print_tables(groups: list[comparison.Group]) -> None:
    show(Grid(comparison.SETTING_HEADINGS, comparison.setting_rows(groups), "Settings"))
    over = "runs" if any(group.repeats_seeds for group in groups) else "seeds"
    columns = {"run": [group.name for group in groups], **comparison.result_columns(groups)}
    rows = list(zip(*columns.values(), strict=True))
    title = f"{groups[0].metric}: mean ± deviation over {over}"
    show(Grid(list(columns), rows, title, numbers=True))
