"""Draw the pictures of docs/concepts.md, most of them from what the package computes.

python docs/draw_concepts.py
"""

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nmlightning import LpBatchNorm1d, gaussian_constant, swap_norms

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
# Colours that are read on white and on black.
BLUE, ORANGE, GREEN, GREY = "#2f81c7", "#e0702a", "#1f9d74", "#808891"
STYLE = {
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.prop_cycle": matplotlib.cycler(color=[BLUE, ORANGE, GREEN, GREY]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "legend.frameon": False,
    "legend.labelcolor": GREY,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "nmlightning",
    "text.color": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
}


def scale_estimate(axes: Axes) -> None:
    """What the norms measure of 60 values of a channel."""
    x = np.random.default_rng(1).normal(2, 1.5, 60)
    d = np.abs(x - x.mean())
    axes.vlines(x, 0, 0.6, color=GREY, alpha=0.7, linewidth=0.8)
    estimates = {
        "L2": np.sqrt(np.mean(d**2)),
        "L1": gaussian_constant("l1", 60) * d.mean(),
        "L∞": gaussian_constant("linf", 60) * d.max(),
    }
    for row, ((name, s), colour) in enumerate(
        zip(estimates.items(), (BLUE, ORANGE, GREEN), strict=True)
    ):
        y = 1 + 0.6 * row
        axes.plot([x.mean() - s, x.mean() + s], [y, y], color=colour, marker="|")
        axes.text(x.mean() + s + 0.2, y, f"{name}: ŝ = {s:.2f}", va="center", color=colour)
    axes.axvline(x.mean(), color=GREY, linewidth=0.8, linestyle=":")
    axes.text(x.mean() + 0.06, 2.5, "μ")
    axes.set(xlabel="values x of a channel; bars: μ ± ŝ", ylim=(0, 2.8), yticks=[])
    axes.spines.left.set_visible(False)


def constant(axes: Axes) -> None:
    """The bare statistic of n Gaussian values, and what the constant makes of it."""
    n = [2**power for power in range(4, 18)]
    for name, label in (("linf", "max |x − μ|"), ("topk", "10 largest"), ("l1", "mean |x − μ|")):
        axes.plot(n, [1 / gaussian_constant(name, size) for size in n], label=label)
    axes.axhline(1, color=GREY, linestyle="--", label="each, times its constant")
    axes.set(xscale="log", xlabel="n values of a channel", ylabel="statistic / σ", ylim=(0, 5.6))
    axes.legend(fontsize=7.5, loc="upper left", ncols=2, handlelength=1.2)


def running_variance(axes: Axes) -> None:
    """ŝ² of batches, and the buffer that evaluation divides by."""
    torch.manual_seed(0)
    norm, batches, buffer = LpBatchNorm1d(1), [], []
    for _ in range(60):
        x = 2 * torch.randn(32, 1)
        norm(x)
        batches.append((np.sqrt(np.pi / 2) * (x - x.mean()).abs().mean().item()) ** 2)
        buffer.append(norm.running_var.item())
    axes.plot(batches, ".", color=GREY, label="ŝ² of each batch")
    axes.plot(buffer, label="running_var")
    axes.axhline(4, color=GREEN, linestyle=":", label="σ²")
    axes.set(xlabel="step", ylim=(0, 11))
    axes.legend(fontsize=7.5, ncols=3, loc="upper center", handlelength=1.2)


def swap(axes: Axes) -> None:
    """The class of a layer changes; what it holds stays."""
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(8))
    before, weight = type(model[0]).__name__, model[0].weight
    swap_norms(model, "l1")
    assert model[0].weight is weight
    box(axes, 0.02, before, "weight, bias\nrunning_mean\nrunning_var", GREY)
    box(axes, 0.60, type(model[0]).__name__, "the same five\ntensors", BLUE)
    arrow(axes, (0.41, 0.5), (0.59, 0.5))
    axes.text(0.5, 0.58, "swap", ha="center")


def recipe(axes: Axes) -> None:
    """Plain data in the checkpoint, by which the model is made again."""
    box(axes, 0.02, "last.ckpt", "state_dict\noptimizer_states\nnmlightning", GREY)
    box(axes, 0.50, "recipe", "bn1: L1BatchNorm2d\nbn2: …", BLUE, width=0.48)
    arrow(axes, (0.39, 0.33), (0.49, 0.42))


def half_range(axes: Axes) -> None:
    """Deviations at which a norm in float16 is right: the table of docs/half_precision.md."""
    for y, (name, low, high, colour) in enumerate(
        (("L2", 0.1, 50, ORANGE), ("L1", 1e-4, 1e4, BLUE))
    ):
        axes.barh(y, high - low, left=low, height=0.5, color=colour)
        axes.text(np.sqrt(low * high), y, name, ha="center", va="center", color="white")
    axes.set(xscale="log", xlim=(1e-5, 1e6), yticks=[], ylim=(-0.6, 1.6))
    axes.set_xlabel("deviations of the input where float16 is right")
    axes.spines.left.set_visible(False)


def effective_rate(axes: Axes) -> None:
    """At one rate: a weight of twice the length has half the gradient, so a fourth of the angle."""
    for x, length, colour in ((0.0, 1.1, ORANGE), (1.8, 2.2, BLUE)):
        step = 0.75 / length
        pull(axes, (x, 0), (x + length, 0), colour)
        pull(axes, (x + length, 0), (x + length, step), GREEN)
        pull(axes, (x, 0), (x + length, step), colour, linestyle="--")
        angle = np.degrees(np.arctan2(step, length))
        axes.text(x + length / 2, -0.24, f"turns by {angle:.0f}°", ha="center", color=colour)
    axes.text(1.15, 0.62, "η times the gradient", color=GREEN)
    plain(axes, (-0.1, 4.3), (-0.4, 0.85))


def rotation(axes: Axes) -> None:
    """The angle between a weight before and after a step."""
    before, after = np.array([1.9, 0.25]), np.array([1.55, 0.95])
    pull(axes, (0, 0), before, GREY)
    pull(axes, (0, 0), after, BLUE)
    pull(axes, before, after, GREEN)
    turn = np.linspace(np.arctan2(*before[::-1]), np.arctan2(*after[::-1]), 30)
    axes.plot(0.8 * np.cos(turn), 0.8 * np.sin(turn), color=ORANGE)
    axes.text(0.86, 0.27, "rotation", color=ORANGE)
    axes.text(1.95, 0.16, "before", color=GREY)
    axes.text(1.5, 1.02, "after", color=BLUE)
    axes.text(1.82, 0.6, "step", color=GREEN)
    plain(axes, (-0.5, 3.0), (-0.1, 1.25))


def equilibrium(axes: Axes) -> None:
    """Norms of a scale-invariant weight under SGD with decay, from three starts."""
    draw, (rate, decay) = np.random.default_rng(0), (0.1, 0.02)
    for start, colour in ((3.0, BLUE), (1.5, ORANGE), (0.5, GREEN)):
        w, norms = np.full(64, start / 8), []
        for _ in range(1500):
            g = draw.normal(size=64) / 8
            g = (g - w * (g @ w) / (w @ w)) / np.linalg.norm(w)
            w = w - rate * (g + decay * w)
            norms.append(np.linalg.norm(w))
        axes.plot(norms, color=colour, linewidth=1.2)
    axes.axhline((rate / (2 * decay)) ** 0.25, color=GREY, linestyle="--")
    axes.text(1500, (rate / (2 * decay)) ** 0.25 + 0.12, "equilibrium", ha="right")
    axes.set(xlabel="step", ylabel="norm ‖w‖", ylim=(0, 3.1))


def recording(axes: Axes) -> None:
    """The median norm of each convolution of a run of the study, at every epoch."""
    with (RESULTS / "recordings/wd_on-1.csv").open(encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if "features" in row["layer"]]
    for layer in sorted({row["layer"] for row in rows}):
        norms = [float(row["norm"]) for row in rows if row["layer"] == layer]
        axes.plot(range(1, len(norms) + 1), norms, color=BLUE, alpha=0.6, linewidth=1)
    axes.set(xlabel="epoch", ylabel="norm of a layer", yscale="log", yticks=(0.5, 1, 2))
    axes.set_yticklabels(["0.5", "1", "2"])
    axes.minorticks_off()


def accuracy(axes: Axes, *runs: tuple[str, str]) -> None:
    for name, label in runs:
        with (RESULTS / f"weight_decay/{name}-1.csv").open(encoding="utf-8") as lines:
            top1 = [100 * float(row["val/top1"]) for row in csv.DictReader(lines)]
        axes.plot(range(1, len(top1) + 1), top1, label=label, linewidth=1.2)
    axes.set(xlabel="epoch", ylabel="test top-1, %", ylim=(60, 92))
    axes.legend(fontsize=7.5, loc="lower right", handlelength=1.2)


def steering(axes: Axes) -> None:
    """A rule that hooks into the optimizer's steps."""
    box(axes, 0.0, "recording", "norms of\nanother run", GREY, width=0.28)
    box(axes, 0.36, "rule", "before and after\neach step", BLUE, width=0.28)
    box(axes, 0.72, "optimizer", "step(): longer,\nshorter", GREEN, width=0.28)
    arrow(axes, (0.285, 0.5), (0.355, 0.5))
    arrow(axes, (0.645, 0.5), (0.715, 0.5))


def lr_correction(axes: Axes) -> None:
    runs = ("wd_on", "decay"), ("wd_off", "no decay"), ("lr_correction", "no decay, corrected")
    accuracy(axes, *runs)


def norm_schedule(axes: Axes) -> None:
    """The study's schedule of the rate, as norms at a constant rate."""
    epochs = np.arange(80)
    rate = 0.1 * 0.1 ** (epochs // 20)
    axes.step(epochs, rate / 0.1, color=GREY)
    axes.step(epochs, np.sqrt(0.1 / rate), color=BLUE)
    axes.text(79, 3e-2, "usual: rate / first rate", ha="right")
    axes.text(0, 25, "here: norm / recorded norm, rate constant", color=BLUE)
    axes.set(xlabel="epoch", yscale="log", ylim=(5e-4, 200))


def normalised_weights(axes: Axes) -> None:
    """v wanders; what the layer computes with has the length g."""
    circle(axes)
    for angle, length in ((0.2, 1.3), (0.75, 1.8), (1.35, 2.0)):
        v = length * np.array([np.cos(angle), np.sin(angle)])
        pull(axes, (0, 0), v, GREY, linestyle=":")
        axes.plot(*(v / length), "o", color=BLUE)
    axes.text(1.4, 1.0, "v, which the optimizer\nchanges")
    axes.text(-1.0, 0.75, "w = g v/‖v‖", color=BLUE, ha="right")
    plain(axes, (-2.6, 3.9), (-0.1, 2.05))


def bounded_weights(axes: Axes) -> None:
    """One fixed length for all channels of a layer."""
    circle(axes)
    for angle in np.linspace(0.1, 3.05, 9):
        pull(axes, (0, 0), (np.cos(angle), np.sin(angle)), BLUE)
    axes.text(1.15, 0.75, "every channel of the layer:\nlength ρ, never trained")
    plain(axes, (-1.6, 4.2), (-0.1, 1.25))


def circle(axes: Axes) -> None:
    turn = np.linspace(0, np.pi, 90)
    axes.plot(np.cos(turn), np.sin(turn), color=GREY, linewidth=0.8)


def pull(
    axes: Axes, start: tuple[float, ...], end: tuple[float, ...], colour: str, linestyle: str = "-"
) -> None:
    style = {
        "arrowstyle": "->",
        "color": colour,
        "linestyle": linestyle,
        "shrinkA": 0,
        "shrinkB": 0,
    }
    axes.annotate("", end, start, arrowprops={**style, "linewidth": 1.6})


def plain(axes: Axes, x: tuple[float, float], y: tuple[float, float]) -> None:
    axes.set(xlim=x, ylim=y, aspect="equal")
    axes.axis("off")


def box(axes: Axes, x: float, title: str, body: str, colour: str, width: float = 0.38) -> None:
    axes.axis("off")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    frame = {"fill": False, "edgecolor": colour, "linewidth": 1.4, "clip_on": False}
    axes.add_patch(matplotlib.patches.Rectangle((x, 0.1), width, 0.8, **frame))
    axes.text(x + width / 2, 0.74, title, ha="center", weight="bold", color=colour)
    axes.text(x + width / 2, 0.38, body, ha="center", va="center", fontsize=8)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": GREY})


DRAWN: tuple[Callable[[Axes], None], ...] = (
    scale_estimate, constant, running_variance, swap, recipe, half_range, effective_rate, rotation,
    equilibrium, recording, steering, lr_correction, norm_schedule, normalised_weights,
    bounded_weights,
)  # fmt: skip


def main() -> None:
    """Write an SVG for each of DRAWN and one for README, the same bytes whenever it is run."""
    with matplotlib.rc_context(STYLE):
        for draw in DRAWN:
            picture = Figure(figsize=(4.4, 1.9), layout="constrained")
            draw(picture.add_subplot())
            save(picture, f"concept_{draw.__name__}")
        picture = Figure(figsize=(6.6, 1.9), layout="constrained")
        left, right = picture.subplots(1, 2)
        half_range(left)
        left.set_title("L1 suits float16, L2 does not", fontsize=9.5)
        lr_correction(right)
        right.set_title("Decay acts through norms of weights", fontsize=9.5)
        save(picture, "overview")


def save(picture: Figure, name: str) -> None:
    svg = io.StringIO()
    about = {"Creator": None, "Date": None}
    picture.savefig(svg, format="svg", transparent=True, metadata=about)
    text = re.sub(r"(\.\d\d)\d+", r"\1", svg.getvalue())
    (HERE / f"pictures/{name}.svg").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
