"""Train small networks on digits, and draw the pictures of docs/norm_control.md (5 minutes).

python docs/draw_norm_control.py
"""

import copy
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import matplotlib
import torch
from draw_concepts import HERE, STYLE, save
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from nmlightning import CorrectedDecay, DecayEquivalentLR, Hyperball, RadialProjection
from nmlightning.optim import StepRule
from nmlightning.optim.families import expected_rotation
from nmlightning.weights.channel_norms import channel_norms, rotations

sys.path.insert(0, str(HERE.parent / "benchmarks"))
from equilibrium import PRODUCT, Case, start, take_steps

SEEDS = 3
SHOWN = 50  # points of a curve, each the mean of the steps around it
BATCH = 64
DIGITS = load_digits()
IMAGES = torch.tensor(DIGITS.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
LABELS = torch.tensor(DIGITS.target)
TRAINING = torch.arange(len(LABELS)) < 1500
Run = tuple[Callable[..., Optimizer], Mapping[str, float], StepRule | None]


def make_net() -> nn.Sequential:
    """Three convolutions under batch norms, and a head."""
    blocks: list[nn.Module] = []
    for channels, width, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1)):
        convolution = nn.Conv2d(channels, width, 3, stride, padding=stride % 2, bias=False)
        blocks += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def convolutions(net: nn.Module) -> list[Tensor]:
    return [q for q in net.parameters() if q.dim() == 4]


def train(
    net: nn.Module, run: Run, steps: int, measure: Callable[[list[Tensor], list[Tensor]], float],
    *, falls: bool = False, wrong: float = 0.0, chosen: Tensor = TRAINING,
) -> list[float]:  # fmt: skip
    """Return what `measure` says of the convolutions before each step and after it.

    The learning rate may fall to 0, and a share of the labels be random, others in each step.
    """
    make, options, rule = run
    optimizer, weights = make(net.parameters(), **options), convolutions(net)
    if rule is not None:
        rule.attach(optimizer, net)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - falls * t / steps)
    indices, measured = chosen.nonzero()[:, 0], []
    for _ in range(steps):
        batch = indices[torch.randint(len(indices), (BATCH,))]
        labels = torch.where(torch.rand(BATCH) < wrong, torch.randint(10, (BATCH,)), LABELS[batch])
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(IMAGES[batch]), labels).backward()
        before = [q.detach().clone() for q in weights]
        optimizer.step()
        schedule.step()
        measured.append(measure(before, weights))
    return measured


def gradient_norm(_: list[Tensor], weights: list[Tensor]) -> float:
    return float(sum(q.grad.square().sum() for q in weights if q.grad is not None)) ** 0.5


def turned(before: list[Tensor], weights: list[Tensor]) -> float:
    """Return by how many degrees a step turned the channels, in the mean."""
    angles = []
    for old, new in zip(before, weights, strict=True):
        steps = new.detach() - old
        angles.append(rotations(*(channel_norms(x) for x in (old, new.detach(), steps))))
    return math.degrees(float(torch.cat(angles).mean()))


def draw_curves(axes: Axes, curves: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Draw of each name the mean of its curves, and the range of them."""
    for name, values in curves.items():
        points = torch.tensor(values).unflatten(1, (SHOWN, -1)).mean(2)
        steps = (torch.arange(SHOWN) + 0.5) * (len(values[0]) / SHOWN)
        (line,) = axes.plot(steps, points.mean(0), label=name)
        lowest, highest = points.amin(0), points.amax(0)
        axes.fill_between(steps, lowest, highest, color=line.get_color(), alpha=0.25, linewidth=0)
    axes.legend(fontsize=8)
    axes.set_xlabel("step")


def from_scratch(
    runs: Mapping[str, Run], *settings: Any, **options: Any
) -> dict[str, list[list[float]]]:
    curves: dict[str, list[list[float]]] = {name: [] for name in runs}
    for seed, (name, run) in product(range(SEEDS), runs.items()):
        torch.manual_seed(seed)
        curves[name].append(train(make_net(), run, *settings, wrong=0.3, **options))
    return curves


def late(axes: Axes) -> None:
    """Norms of gradients while the learning rate falls to 0."""
    given = {"lr": 0.01, "weight_decay": 0.0}
    runs: dict[str, Run] = {
        "AdamW's own decay": (AdamW, {**given, "weight_decay": 0.5}, None),
        "CorrectedDecay": (AdamW, given, CorrectedDecay(0.5)),
    }
    draw_curves(axes, from_scratch(runs, 3000, gradient_norm, falls=True))
    axes.set(ylabel="norm of gradients", ylim=(0, None))


def optimizers(axes: Axes) -> None:
    """Rotations in the simulation of benchmarks/equilibrium.py, and those of the formula."""
    for name, rate, options in (
        ("SGD", 0.1, {"momentum": 0.9}),
        ("AdamW", 1e-3, {}),
        ("Muon", 1e-2, {}),
    ):
        weight, optimizer = start(
            Case("torch.optim", name, rate, options), 1.0, rate, PRODUCT / rate
        )
        _, angles = take_steps(optimizer, weight, 20_000, torch.Generator().manual_seed(1))
        curve = angles.square().mean(1).unflatten(0, (SHOWN, -1)).mean(1).sqrt().rad2deg()
        steps = (torch.arange(SHOWN) + 0.5) * (len(angles) / SHOWN)
        (line,) = axes.plot(steps, curve, label=name)
        if expected := expected_rotation(optimizer, optimizer.param_groups[0]):
            colour = line.get_color()
            axes.axhline(math.degrees(expected), color=colour, linestyle=":", linewidth=1)
    axes.set(xlabel="step; dotted: by the formula", ylabel="degrees a step", yscale="log")
    axes.legend(fontsize=8)


def no_decay(axes: Axes) -> None:
    """Rotations with weight decay, without, and with what replaces it."""
    given = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}
    runs: dict[str, Run] = {
        "decay": (SGD, {**given, "weight_decay": 5e-3}, None),
        "no decay": (SGD, given, None),
        "DecayEquivalentLR": (SGD, given, DecayEquivalentLR(5e-3)),
        "Hyperball": (SGD, {**given, "lr": 0.02}, Hyperball()),
    }
    draw_curves(axes, from_scratch(runs, 1500, turned))
    axes.set(ylabel="degrees a step", yscale="log")


def fine_tune(axes: Axes) -> None:
    """Norms in fine-tuning on 300 digits, over those after training on the digits 0 to 4."""
    given = {"lr": 3e-3, "weight_decay": 0.0}
    runs: dict[str, Run] = {
        "decay": (AdamW, {**given, "weight_decay": 0.1}, None),
        "no decay": (AdamW, given, None),
        "RadialProjection": (AdamW, given, RadialProjection()),
    }
    curves: dict[str, list[list[float]]] = {}
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        trained = make_net()
        train(trained, runs["decay"], 600, turned, chosen=TRAINING & (LABELS < 5))
        first = convolutions(trained)

        def ratio(_: list[Tensor], weights: list[Tensor], first: list[Tensor] = first) -> float:
            pairs = zip(first, weights, strict=True)
            return statistics.fmean(float(new.norm() / old.norm()) for old, new in pairs)

        for name, run in runs.items():
            torch.manual_seed(seed)
            net = copy.deepcopy(trained)
            few = torch.arange(len(LABELS)) < 300
            curves.setdefault(name, []).append(train(net, run, 1500, ratio, chosen=few))
            right = net.eval()(IMAGES[~TRAINING]).argmax(1) == LABELS[~TRAINING]
            print(f"{name}, seed {seed}: {right.float().mean():.1%}")
    draw_curves(axes, curves)
    axes.set(ylabel="norm / pre-trained norm")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with matplotlib.rc_context(STYLE):
        for draw in (late, optimizers, no_decay, fine_tune):
            picture = Figure(figsize=(4.4, 2.2), layout="constrained")
            draw(picture.add_subplot())
            save(picture, f"norm_control_{draw.__name__}")
