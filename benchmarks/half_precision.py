"""Batch norms in pure half on CIFAR-10, from weights of three sizes, in one table and one picture.

    python benchmarks/half_precision.py --data-root data

Batch norm makes a network the same function whatever the size of its weights, so the three starts
differ in nothing but σ, the scale that the norms see. Only the norms are in half; all else is
float32, so that no loss scaling is needed and nothing else can fail.
"""

import argparse
import logging
import math
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from torch import nn

from nmlightning import CIFAR10, ImageClassifier, NormSwap
from nmlightning.models import CifarResNet
from nmlightning.reports.page import COLOURS, Line, draw_lines

HALF = {"stats_dtype": "float16"}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "L2, float32": ("l2", {}),
    "L1, pure half": ("l1", HALF),
    "L2, pure half, op by op": ("half_l2", {}),
    "L2, pure half, compact": ("lp", {"p": 2, **HALF}),
}
SIZES = (1 / 50, 1.0, 100.0)
SMOOTHED = 10  # steps that a point of the picture, and the last loss, is the mean of
STYLE = (
    "svg{font:12px sans-serif;fill:#333}path{fill:none;stroke-width:1.6}line{stroke:#ddd}"
    ".title{font-weight:bold}"
)


@dataclass
class Curve(Callback):
    """The loss of each step, and the scales that the norms saw in the first."""

    losses: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for module in pl_module.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.register_forward_pre_hook(self._measure)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        self.losses.append(float(outputs["loss"]))

    def _measure(self, _: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if not self.losses:
            self.scales += inputs[0].detach().float().std((0, 2, 3)).tolist()


def main() -> None:
    """Train every form from every size, print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--picture", type=Path, default=Path("half_precision.svg"))
    options = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    kind = f"ResNet-{options.depth}, batch 128, {options.steps} steps, seed {options.seed}"
    print(f"torch {torch.__version__}, cpu, {kind}")
    charts = []
    for size in SIZES:
        curves = {}
        for name, swap in FORMS.items():
            curves[name], accuracy = train(swap, size, options)
            print(f"weights × {size:<6g} {name:24} {describe(curves[name], accuracy)}", flush=True)
        charts.append(draw(curves, size))
    options.picture.write_text(beside(charts), encoding="utf-8")


def train(
    swap: tuple[str, dict[str, Any]], size: float, options: argparse.Namespace
) -> tuple[Curve, float]:
    """Return the curve of one run, and its accuracy on 2,000 test images."""
    seed_everything(options.seed, verbose=False)
    net = CifarResNet(options.depth)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.weight *= size
    curve = Curve()
    task = ImageClassifier(net, lambda q: torch.optim.SGD(q, lr=0.1, momentum=0.9))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=options.steps,
        callbacks=[NormSwap(*swap), curve] if swap[0] != "l2" else [curve],
        limit_val_batches=0,
        limit_test_batches=16,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = CIFAR10(options.data_root, batch_size=128)
    trainer.fit(task, data)
    (measured,) = trainer.test(task, data, verbose=False)
    return curve, measured["test/top1"]


def draw(curves: dict[str, Curve], size: float) -> str:
    """Return the chart of the runs from weights of one size, and what became NaN in words."""
    scales = curves["L2, float32"].scales
    title = f"loss, weights × {size:g}: σ from {min(scales):.2g} to {max(scales):.2g}"
    lines, notes = [], ""
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
        lines.append(line(name, colour, curve.losses))
        if (broken := first_broken(curve)) is not None:
            y = 50 + 16 * notes.count("<text")
            text = f"{escape(name)}: NaN from step {broken}"
            notes += f'<text x="150" y="{y}" style="fill:{colour}">{text}</text>'
    chart = draw_lines(lines, title, "step", size=(400, 260))
    return chart.removesuffix("</svg>") + notes + "</svg>"


def first_broken(curve: Curve) -> int | None:
    """Return the first step whose loss is not finite, if any."""
    return next((i for i, loss in enumerate(curve.losses) if not math.isfinite(loss)), None)


def describe(curve: Curve, accuracy: float) -> str:
    """Return the last losses' mean, or the first step that has none, and the accuracy."""
    broken = first_broken(curve)
    last = f"NaN from step {broken}" if broken is not None else f"{mean_of_last(curve):.3f}"
    return f"loss {last:16} test top-1 {100 * accuracy:.1f} %"


def mean_of_last(curve: Curve) -> float:
    """Return the loss at the end, without the noise of single batches."""
    return float(np.mean(curve.losses[-SMOOTHED:]))


def line(name: str, colour: str, losses: list[float]) -> Line:
    """Return the line of a run: means over a few steps, since single batches are noisy."""
    parts = np.array_split(np.array(losses), max(1, len(losses) // SMOOTHED))
    ends = np.cumsum([len(part) for part in parts]).astype(float)
    return Line(name, colour, ends, np.array([part.mean() for part in parts]))


def beside(charts: list[str]) -> str:
    """Return one SVG with the charts in a row, under the names of their lines."""
    names = "".join(
        f'<text x="{60 + 190 * i}" y="18" class="title" style="fill:{colour}">{escape(name)}</text>'
        for i, (name, colour) in enumerate(zip(FORMS, COLOURS, strict=False))
    )
    placed = "".join(
        chart.replace("<svg ", f'<svg x="{400 * i}" y="26" ', 1) for i, chart in enumerate(charts)
    )
    width = 400 * len(charts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 290" width="{width}" '
        f'height="290"><style>{STYLE}</style><rect width="100%" height="100%" fill="white"/>'
        f"{names}{placed}</svg>\n"
    )


if __name__ == "__main__":
    main()
