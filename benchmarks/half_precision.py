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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from torch import nn

from nmlightning import CIFAR10, ImageClassifier, NormSwap
from nmlightning.models import CifarResNet

HALF = {"stats_dtype": "float16"}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "L2, float32": ("l2", {}),
    "L1, pure half": ("l1", HALF),
    "L2, pure half, op by op": ("half_l2", {}),
    "L2, pure half, compact": ("lp", {"p": 2, **HALF}),
}
SIZES = (1 / 50, 1.0, 100.0)
SMOOTHED = 10  # steps that a point of the picture, and the last loss, is the mean of


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
    figure = Figure((12, 3.2), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(SIZES)), SIZES, strict=True):
        curves = {}
        for name, swap in FORMS.items():
            curves[name], accuracy = train(swap, size, options)
            print(f"weights × {size:<6g} {name:24} {describe(curves[name], accuracy)}", flush=True)
        draw(axes, curves, size)
    lines, names = axes.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper center", ncols=len(FORMS), frameon=False)
    figure.savefig(options.picture, metadata={"Date": None})


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


def draw(axes: Axes, curves: dict[str, Curve], size: float) -> None:
    """Draw the runs from weights of one size, and say in words what became NaN."""
    scales = curves["L2, float32"].scales
    axes.set_title(f"loss, weights × {size:g}: σ from {min(scales):.2g} to {max(scales):.2g}")
    axes.set_xlabel("step")
    for number, (name, curve) in enumerate(curves.items()):
        # Means over a few steps, since single batches are noisy.
        parts = np.array_split(np.array(curve.losses), max(1, len(curve.losses) // SMOOTHED))
        ends = np.cumsum([len(part) for part in parts])
        (line,) = axes.plot(ends, [part.mean() for part in parts], label=name)
        if (broken := first_broken(curve)) is not None:
            text = f"{name}: NaN from step {broken}"
            at, across = (0.97, 0.95 - 0.08 * number), axes.transAxes
            axes.text(*at, text, color=line.get_color(), ha="right", va="top", transform=across)


def first_broken(curve: Curve) -> int | None:
    """Return the first step whose loss is not finite, if any."""
    return next((i for i, loss in enumerate(curve.losses) if not math.isfinite(loss)), None)


def describe(curve: Curve, accuracy: float) -> str:
    """Return the last losses' mean, or the first step that has none, and the accuracy."""
    broken = first_broken(curve)
    end = np.mean(curve.losses[-SMOOTHED:])  # without the noise of single batches
    last = f"NaN from step {broken}" if broken is not None else f"{end:.3f}"
    return f"loss {last:16} test top-1 {100 * accuracy:.1f} %"


if __name__ == "__main__":
    main()
