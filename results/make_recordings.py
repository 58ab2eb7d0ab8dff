"""Writes docs/recordings.md and its pictures from what runs recorded of their layers.

`make_tables.py` calls it. It reads `recordings/<run>-<seed>.csv`, which `keep_run.py` writes.
"""

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from recordings import (
    SMOOTHED,
    Recording,
    Recordings,
    layer_factors,
    predicted_ratio,
    read_recordings,
    settled_epochs,
)

NOT_RUN = "not run yet"
# Okabe and Ito's colours, which colour-blind people tell apart, without the yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B6B6B")
# Read on white and on black.
GREY = "#808891"
STYLE = {"savefig.transparent": True, "svg.fonttype": "none", "svg.hashsalt": "nmlightning"}
STYLE |= dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "legend.labelcolor"), GREY)
STYLE |= dict.fromkeys(("text.color", "xtick.color", "ytick.color"), GREY)
DECAY_RATE = 5e-4  # η λ / (1 − m) of the study at η = 0.1: per step, of ‖w‖ where no gradient is
LARGEST_FLOAT32 = 3.4e38
OPTIMIZERS = {"sgd": "SGD", "momentum": "momentum", "adamw": "AdamW"}
RULES = {
    "lr_correction": "stable rule",
    "paper_official": "literal, norms of the epoch's end",
    "paper_interpolated": "literal, norms of the moment",
}


def fill(text: str) -> str:
    """Return its paragraphs in lines, and its tables as they are."""
    parts = text.rstrip().split("\n\n")
    wrap = textwrap.TextWrapper(118, break_on_hyphens=False).fill
    return "\n\n".join(part if part.startswith("|") else wrap(part) for part in parts)


def state_of(recordings: Recordings, *names: str) -> str:
    """Return how far runs are: `wd_on 80 epochs, wd_off 46 epochs so far, l1 not run yet`."""
    words = []
    for name in names:
        if (run := recordings.get(name)) is None:
            words.append(f"`{name}` {NOT_RUN}")
        else:
            words.append(f"`{name}` {len(run)} epochs{'' if run.finished else ' so far'}")
    return f"Runs (seed 1): {', '.join(words)}."


def write_equilibrium(recordings: Recordings) -> Iterator[str]:
    """Yield the table of when each layer of the study with decay met the formula, by phase."""
    run = recordings.get("wd_on")
    if run is None:
        return
    phases = [(start, min(start + 20, len(run))) for start in range(0, len(run), 20)]
    phases = [(start, end) for start, end in phases if end - start >= SMOOTHED]
    headings = [f"{start + 1} to {end}" for start, end in phases]
    yield "| layer | " + " | ".join(f"epochs {h}: after | angle / formula" for h in headings) + " |"
    yield "|---|" + "---|---|" * len(phases)
    settled = [settled_epochs(run.ratio[start:end]) for start, end in phases]
    late = [run.mean_ratio(max(start, end - 5), end) for start, end in phases]
    for number, layer in enumerate(run.layers):
        cells = [f"{a[number]} | {b[number]:.2f}" for a, b in zip(settled, late, strict=True)]
        yield f"| `{layer.removeprefix('net.')}` | {' | '.join(cells)} |"


def write_optimizers(recordings: Recordings) -> Iterator[str]:
    """Yield the table of the angles of three optimizers in the last 3/8 of their epochs."""
    yield "| | formula, rad | measured | ratio | layers | logged steps | layers within 5 % |"
    yield "|---|---|---|---|---|---|---|"
    for prefix, (name, label) in product(("rotation", "digits"), OPTIMIZERS.items()):
        label = f"{label}, digits" if prefix == "digits" else label
        if (run := recordings.get(f"{prefix}_{name}")) is None:
            yield f"| {label} | {NOT_RUN} |" + " |" * 5
            continue
        formula = run.columns["equilibrium"][-1, 0]
        late = len(run) * 3 // 8
        ratios = run.mean_ratio(-late)
        ratio = math.sqrt(np.mean(ratios**2))
        steps = run.columns["logged_steps"][-late:, 0].sum()
        within = sum(abs(ratios - 1) <= 0.05)
        yield (
            f"| {label} | {formula:.5f} | {ratio * formula:.5f} | {ratio:.3f} |"
            f" {min(ratios):.3f} to {max(ratios):.3f} | {steps:.0f} | {within} of {len(ratios)} |"
        )


def write_factors(recordings: Recordings) -> Iterator[str]:
    """Yield the largest factors of the rules, and what the recording asks of the stable one."""
    yield "| | largest factor of a channel | in epoch | largest norm of a channel |"
    yield "|---|---|---|---|"
    for name, label in {"wd_on": "asked of the stable rule by decay on", **RULES}.items():
        if (run := recordings.get(name)) is None:
            yield f"| {label} | {NOT_RUN} | | |"
        else:
            factors = layer_factors(run).max(axis=1)
            norm = run.columns["norm_max"].max()
            yield f"| {label} | {factors.max():.3g} | {factors.argmax() + 1} | {norm:.3g} |"


def write_norms(recordings: Recordings) -> Iterator[str]:
    """Yield how far the norms of L1's weights are from those of L2's at the end."""
    if not {"l1", "l2"} <= recordings.keys():
        return
    ratios = recordings["l1"].columns["norm"][-1] / recordings["l2"].columns["norm"][-1]
    middle, layer = float(np.median(ratios)), recordings["l1"].layers
    yield (
        f"After the last epoch the norms by L1 are {middle:.3f} times those by L2 in the median of"
        f" layers, from {min(ratios):.3f} (`{layer[ratios.argmin()]}`) to {max(ratios):.3f}"
        f" (`{layer[ratios.argmax()]}`)."
    )


def draw_layers(axes: Axes, run: Recording, values: NDArray[np.float64], **style: Any) -> None:
    """Draw a strong line of the median and a faint one of each layer, over epochs or else `x`."""
    label, x = style.pop("label"), style.pop("x", run.epochs)
    axes.plot(x, values, alpha=0.3, linewidth=0.7, **style)
    axes.plot(x, np.median(values, axis=1), linewidth=1.8, label=label, **style)


def draw_rates(picture: Figure, recordings: Recordings) -> None:
    panels = picture.subplots(1, 2)
    titles = ("effective rate η / ((1 − m) ‖w‖²)", "angle of a step, rad")
    for axes, column, title in zip(panels, ("effective_lr", "rotation"), titles, strict=True):
        for name, label, colour in zip(
            ("wd_on", "wd_off"), ("decay on", "decay off"), COLOURS, strict=False
        ):
            if (run := recordings.get(name)) is not None:
                draw_layers(axes, run, run.columns[column], color=colour, label=label)
        axes.set(yscale="log", title=title)
        axes.legend(frameon=False, fontsize=8)


def draw_equilibrium(picture: Figure, recordings: Recordings) -> None:
    axes, run = picture.subplots(), recordings["wd_on"]
    colours = matplotlib.colormaps["viridis"](np.linspace(0.3, 0.9, len(run.layers)))
    for layer, values, colour in zip(run.layers, run.ratio.T, colours, strict=True):
        label = layer.removeprefix("net.")
        axes.plot(run.epochs, values, color=colour, linewidth=1, label=label)
    start = run.ratio[0].min()
    for phase, first in enumerate(range(0, len(run), 20)):
        expected = predicted_ratio(start, DECAY_RATE / 10**phase, min(20, len(run) - first))
        axes.plot(first + 1 + np.arange(len(expected)), expected, "--", color=GREY, linewidth=1.2)
        start = expected[-1] / math.sqrt(10)
    draw_band(axes)
    axes.set_ylim(bottom=0.05)
    axes.set_ylabel("angle of a step / formula")
    axes.legend(frameon=False, fontsize=7, ncols=3)


def draw_optimizers(picture: Figure, recordings: Recordings) -> None:
    panels = picture.subplots(1, len(OPTIMIZERS), sharey=True)
    for axes, (name, label) in zip(panels, OPTIMIZERS.items(), strict=True):
        axes.set_title(label)
        draw_band(axes)
        axes.set_xlabel("step")
        data = {"digits": "digits", "rotation": "CIFAR-10"}
        for (prefix, text), colour in zip(data.items(), COLOURS, strict=False):
            if (run := recordings.get(f"{prefix}_{name}")) is not None:
                steps = run.columns["step"][:, 0]
                draw_layers(axes, run, run.ratio, x=steps, color=colour, label=text)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
        else:
            axes.text(0.5, 0.5, NOT_RUN, ha="center", transform=axes.transAxes)
    panels[0].set_ylabel("angle of a step / formula")


def draw_band(axes: Axes) -> None:
    """Mark ±5 % about 1 on an axis for ratios."""
    ticks = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0)
    axes.set_yscale("log")
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(0.15, 2.5)
    axes.axhspan(0.95, 1.05, color="#999999", alpha=0.3, linewidth=0)


def draw_factors(picture: Figure, recordings: Recordings) -> None:
    axes = picture.subplots()
    lines = {"wd_on": "asked of the stable rule", **RULES}
    for (name, label), colour in zip(lines.items(), COLOURS, strict=False):
        if (run := recordings.get(name)) is not None:
            factors = layer_factors(run)
            draw_layers(axes, run, factors, color=colour, label=label)
            if factors.max() > 1e20:
                axes.axhline(LARGEST_FLOAT32, color=GREY, linewidth=0.8)
    axes.set(yscale="log", ylabel="largest factor of a channel")
    axes.legend(frameon=False, fontsize=8)


def draw_norms(picture: Figure, recordings: Recordings) -> None:
    axes, runs = picture.subplots(), [recordings[name] for name in ("l1", "l2")]
    shortest = min(runs, key=len)
    ratios = np.divide(*(run.columns["norm"][: len(shortest)] for run in runs))
    draw_layers(axes, shortest, ratios, color=COLOURS[0], label="median of layers")
    axes.set(ylabel="‖w‖ by L1 / by L2")
    axes.legend(frameon=False, fontsize=8)


DRAWERS: dict[str, Callable[[Figure, Recordings], None]] = {
    "rates": draw_rates,
    "equilibrium": draw_equilibrium,
    "optimizers": draw_optimizers,
    "factors": draw_factors,
    "norms": draw_norms,
}
WRITERS: dict[str, Callable[[Recordings], Iterator[str]]] = {
    "equilibrium": write_equilibrium,
    "optimizers": write_optimizers,
    "factors": write_factors,
    "norms": write_norms,
}


def save_picture(picture: Figure, file: Path) -> None:
    """Write an SVG, with coordinates to 0.01 points; its bytes follow from what was drawn."""
    for axes in picture.axes:
        axes.set_xlabel(axes.get_xlabel() or "epoch")
        axes.grid(alpha=0.3)
    svg = io.StringIO()
    picture.savefig(svg, format="svg", metadata={"Creator": None, "Date": None})
    file.write_text(re.sub(r"(\.\d\d)\d+(?=[^<>]*>)", r"\1", svg.getvalue()), encoding="utf-8")


def make_recordings(page: dict[str, Any], tables: dict[str, str], folder: Path, docs: Path) -> None:
    """Write the page and its pictures.

    Args:
        page: `recordings` of page.yaml.
        tables: of each run of the plan.
        folder: `results`.
        docs: of the repository that is written to.
    """
    recordings = read_recordings(folder, tables)
    lines = ["# Recorded norms", "", textwrap.fill(page["introduction"], 118)]
    for name, text in page["sections"].items():
        lines += ["", f"## {text['title']}", "", fill(text["about"])]
        lines += ["", *textwrap.wrap(state_of(recordings, *text["runs"]), 118)]
        if set(text["drawn"]) <= recordings.keys():
            lines += ["", f"![{text['title']}](pictures/recordings_{name}.svg)"]
            picture = Figure(figsize=(7, 3.6), layout="constrained")
            DRAWERS[name](picture, recordings)
            save_picture(picture, docs / "pictures" / f"recordings_{name}.svg")
        if table := list(WRITERS.get(name, lambda _: iter(()))(recordings)):
            lines += ["", *table]
        lines += ["", fill(f"**Found**: {text['found']}")]
    (docs / "recordings.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
