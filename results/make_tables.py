"""Writes docs/results.md and recordings.md, pictures and README's table from what runs gave.

python results/make_tables.py
"""

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
import yaml
from make_recordings import COLOURS, NOT_RUN, STYLE, fill, make_recordings, save_picture
from matplotlib.figure import Figure
from plan import HERE, read_plan

from nmlightning.reports.formatting import MeanStd, format_mean_std, is_share

README_MARKS = ("<!-- made by make tables -->\n", "<!-- end -->\n")


@dataclass(frozen=True)
class Kept:
    """What a run gave.

    Attributes:
        rows: of its CSV, one for each validation.
        content: of its JSON.
    """

    rows: list[dict[str, float]]
    content: dict[str, Any]

    @classmethod
    def read(cls, file: Path) -> "Kept":
        with file.with_suffix(".csv").open(encoding="utf-8", newline="") as lines:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(lines)]
        return cls(rows, json.loads(file.read_text("utf-8")))

    def value(self, column: dict[str, Any]) -> float:
        """Return the number of a column: a final one, a count, or a mean over some rows."""
        if "final" in column:
            return float(self.content["final"].get(column["final"], np.nan))
        if column.get("count"):
            return len(self.rows)
        rows = self.rows[column["first"] : column.get("end")]
        return fmean(row[column["metric"]] for row in rows) if rows else np.nan


class Results:
    """All that is kept, by the names of runs.

    Args:
        folder: `results`.
    """

    def __init__(self, folder: Path) -> None:
        plan = read_plan(folder / "plan.yaml").values()
        self.planned = {run.name: len(run.settings["seeds"]) for run in plan}
        self.kept: dict[str, list[Kept]] = {name: [] for name in self.planned}
        for run in sorted(plan, key=lambda run: run.seed):
            if (file := folder / run.table / f"{run}.json").is_file():
                self.kept[run.name].append(Kept.read(file))

    @property
    def missing(self) -> int:
        return sum(self.planned.values()) - sum(map(len, self.kept.values()))

    def cell(self, name: str, column: dict[str, Any]) -> str:
        """Return `86.60 ± 0.15 % (3)`, or `86.60 % (1 of 3)` while seeds are missing."""
        kept = self.kept[name]
        if not kept:
            return NOT_RUN
        metric = column.get("metric", column.get("final", ""))
        values = [run.value(column) for run in kept]
        if column.get("count"):
            return ", ".join(f"{value:.0f}" for value in values)
        count = str(len(kept))
        if len(kept) < self.planned[name]:
            count += f" of {self.planned[name]}"
        value = format_mean_std(MeanStd.of(values), metric)
        return value if value.endswith("runs)") else f"{value} ({count})"  # which says how many


def write_page(page: dict[str, Any], expected: dict[str, str], results: Results) -> str:
    """Return docs/results.md."""
    total = sum(results.planned.values())
    lines = [
        "# Results",
        "",
        f"- **What holds**: {page['holds']}",
        f"- **What does not**: {page['does_not']}",
        f"- **Open**: {results.missing} of {total} runs; WMT14, ImageNet and ResNet-56 are out of"
        " reach here ([below](#out-of-reach)).",
        "",
        page["claims"],
        *INTRODUCTION.splitlines(),
    ]
    for name, table in page["tables"].items():
        lines += ["", f"## {table['title']}", "", fill(f"**The paper**: {table['published']}"), ""]
        lines += write_table(table, results)
        lines += ["", fill(f"**What differs**: {table['differs']}"), ""]
        lines += ["<details><summary>Expected, before the first run</summary>"]
        lines += [
            fill(expected[name]),
            "</details>",
            "",
            fill(f"**Found**: {table.get('found', NOT_JUDGED)}"),
        ]
        for figure in table.get("figures", []):
            if any(results.kept[run] for run in table["rows"]):
                lines += ["", f"![{figure['label']}](pictures/results_{figure['name']}.svg)"]
    lines += ["", "## Out of reach", "", "| | the paper | why not here |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in page["out_of_reach"]]
    return "\n".join(lines) + "\n"


NOT_JUDGED = "not judged yet: its runs are open."
INTRODUCTION = """\
Every run and its expectation is in `results/plan.yaml`, written before the first run; nothing was
chosen by an outcome. In brackets is n, the number of seeds; ± is the deviation over them (n − 1).
Accuracy is that of the 10,000 test images, as in the paper.

```
make results OPTIONS='--data-root DIR'                  # missing runs, two at a time, resumed
make results OPTIONS='--only wd_on-1 --again'           # one run, on another machine
make tables                                             # this page, its pictures, README's table
nm compare results/weight_decay                         # the curves, zoomable
```

`results/<table>/<run>-<seed>.csv` has a row for each epoch, the `.json` beside it the command,
commit, versions, device, precision, threads and minutes of CPU time."""


def write_table(table: dict[str, Any], results: Results) -> Iterator[str]:
    """Yield the lines of a table."""
    with_uva = any("uva" in row for row in table["rows"].values())
    headings = ["", "paper", *(["UVA"] if with_uva else [])]
    headings += [column["heading"] for column in table["columns"]]
    yield f"| {' | '.join(headings)} |"
    yield f"|{'---|' * len(headings)}"
    for name, row in table["rows"].items():
        cells = [row["label"], row["paper"], *([row.get("uva", "—")] if with_uva else [])]
        cells += [results.cell(name, column) for column in table["columns"]]
        yield f"| {' | '.join(map(str, cells))} |"


def write_readme_table(page: dict[str, Any], results: Results) -> str:
    """Return tables of the rows that have runs, with the first of their figures."""
    lines: list[str] = []
    for table in (page["tables"][name] for name in page["readme"]):
        column = table["columns"][0]
        cells = {name: results.cell(name, column) for name in table["rows"] if results.kept[name]}
        if cells:
            lines += ["", f"| {table['title']} | the paper | here | seeds run |", f"|{'---|' * 4}"]
        for name, cell in cells.items():
            row, (value, seeds) = table["rows"][name], cell.removesuffix(")").split(" (")
            lines.append(f"| {row['label']} | {row['paper']} | {value} | {seeds} |")
    return "\n".join(lines[1:]) + "\n"


def replace_between(text: str, marks: tuple[str, str], new: str) -> str:
    """Return the text with what is between the marks replaced."""
    before, _, rest = text.partition(marks[0])
    _, _, after = rest.partition(marks[1])
    return f"{before}{marks[0]}{new}{marks[1]}{after}"


def draw_figure(
    figure: dict[str, Any], table: dict[str, Any], results: Results, file: Path
) -> None:
    """Write the curves of a metric: strong the mean of the seeds, faint each of them."""
    picture = Figure(figsize=(7, 3.6), layout="constrained")
    axes = picture.add_subplot()
    styles = product(("-", "--"), COLOURS)  # a second set of rows is dashed
    for (name, row), (line, colour) in zip(table["rows"].items(), styles, strict=False):
        curves = [[row[figure["metric"]] for row in run.rows] for run in results.kept[name]]
        if not curves:
            continue
        scale = 100 if is_share(figure["metric"]) else 1
        shortest = min(map(len, curves))
        values = scale * np.array([curve[:shortest] for curve in curves])
        epochs = np.arange(1, shortest + 1)
        for each in values if len(values) > 1 else ():
            axes.plot(epochs, each, line, color=colour, alpha=0.25, linewidth=0.8)
        mean = values.mean(axis=0)
        axes.plot(epochs, mean, line, color=colour, label=row["label"], linewidth=1.6)
    axes.set_ylabel(figure["label"] + (", %" if is_share(figure["metric"]) else ""))
    low, high = axes.dataLim.intervaly
    axes.set_yscale("log" if figure.get("log") and high > 10 * low else "linear")
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    picture.legend(frameon=False, fontsize=8, loc="outside right upper")
    save_picture(picture, file)


@matplotlib.rc_context(STYLE)
def make_tables(folder: Path, root: Path) -> None:
    """Write everything.

    Args:
        folder: `results`, of the plan, the page's text and what is kept.
        root: of the repository that is written to.
    """
    page = yaml.safe_load((folder / "page.yaml").read_text("utf-8"))
    plan = yaml.safe_load((folder / "plan.yaml").read_text("utf-8"))
    expected = {name: table["expected"] for name, table in plan["tables"].items()}
    results = Results(folder)
    pictures = root / "docs" / "pictures"
    for table in page["tables"].values():
        if any(results.kept[run] for run in table["rows"]):
            for figure in table.get("figures", []):
                draw_figure(figure, table, results, pictures / f"results_{figure['name']}.svg")
    write(root / "docs" / "results.md", write_page(page, expected, results))
    tables = {name: each for each, table in plan["tables"].items() for name in table["runs"]}
    make_recordings(page["recordings"], tables, folder, root / "docs")
    readme = root / "README.md"
    table = write_readme_table(page, results)
    write(readme, replace_between(readme.read_text("utf-8"), README_MARKS, table))


def write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    if arguments:
        raise SystemExit(__doc__)
    make_tables(HERE, HERE.parent)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
