"""Simulates optimizers on a scale-invariant weight: power, norm and rotation.

    python benchmarks/equilibrium.py [--only torch.optim 'heavyball.SOAP' …] [--steps 20000]
    python benchmarks/equilibrium.py --rows equilibrium.jsonl --write docs/norm_control.md

The gradient of each output channel is Gaussian, independent over time, orthogonal to the channel
and divided by its norm, as the loss of a scale-invariant weight has it; nothing is learned. A line
of the file of rows is an optimizer; what is there is not tried again. Packages that are not
installed are left out.
"""

import argparse
import importlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmlightning.optim.families import expected_rotation, known_power
from nmlightning.weights.channel_norms import rotations

SHAPE = 48, 32  # output channels, inputs
PRODUCT = 2e-4  # learning rate × weight decay
NORMS, SMALL_ANGLE = (0.1, 0.4), 1e-3  # of the power's slope
SETTLED = 0.01  # change of ln ‖w‖ over the steps measured
_BEGIN, _END = "<!-- equilibrium: begin -->", "<!-- equilibrium: end -->"


@dataclass(frozen=True)
class Case:
    """An optimizer with a learning rate, the options of its class and those of its group."""

    package: str
    name: str
    rate: float
    options: Mapping[str, Any] = field(default_factory=dict)
    group: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.package}.{self.name}" + (f"({options})" if options else "")

    def make(self, weight: Tensor, rate: float, decay: float) -> Any:
        cls = getattr(importlib.import_module(self.package), self.name)
        group = {"params": [weight], **self.group}
        optimizer = cls([group], lr=rate, weight_decay=decay, **self.options)
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()
        return optimizer


_BESIDE = {"decoupled_weight_decay": True}
_MUON = {"use_muon": True}
CASES = [
    Case("torch.optim", "SGD", 0.1),
    Case("torch.optim", "SGD", 0.1, {"momentum": 0.9}),
    Case("torch.optim", "SGD", 0.1, {"momentum": 0.9, "nesterov": True}),
    Case("torch.optim", "AdamW", 1e-3),
    Case("torch.optim", "NAdam", 1e-3, _BESIDE),
    Case("torch.optim", "RAdam", 1e-3, _BESIDE),
    Case("torch.optim", "Muon", 1e-2),
    Case("torch.optim", "Muon", 1e-2, {"nesterov": False}),
    Case("torch.optim", "Adafactor", 1e-2),
    Case("torchao.optim", "AdamW8bit", 1e-3),
    Case("schedulefree", "SGDScheduleFree", 0.1),
    Case("schedulefree", "AdamWScheduleFree", 1e-3),
    *(
        Case("pytorch_optimizer", name, rate)
        for name, rate in (
            *(("Lion", 1e-4), ("Tiger", 1e-4), ("SignSGD", 1e-4), ("CAME", 1e-3), ("SOAP", 1e-3)),
            *(("Shampoo", 1e-2), ("ScalableShampoo", 1e-3), ("ADOPT", 1e-3), ("AdEMAMix", 1e-3)),
            *(("AdaBelief", 1e-3), ("MARS", 1e-3), ("Lamb", 1e-3), ("LARS", 1.0), ("LaProp", 1e-3)),
            *(("StableAdamW", 1e-3), ("NovoGrad", 1e-3), ("AdamP", 1e-3)),
            *(("SCION", 1e-3), ("Grams", 1e-3), ("ScheduleFreeAdamW", 1e-3)),
        )
    ),
    Case("pytorch_optimizer", "AdaFactor", 1e-2, {"relative_step": False}),
    Case("pytorch_optimizer", "SGDW", 0.1, {"momentum": 0.9}),
    Case("pytorch_optimizer", "SGDP", 0.1, {"momentum": 0.9}),
    Case("pytorch_optimizer", "Muon", 1e-2, {}, _MUON),
    Case("pytorch_optimizer", "AdaMuon", 1e-3, {}, _MUON),
    Case("pytorch_optimizer", "NorMuon", 1e-2, {}, _MUON),
    *(
        Case("heavyball", name, rate)
        for name, rate in (
            *(("AdamW", 1e-3), ("SOAP", 1e-3), ("Muon", 1e-2)),
            *(("SFAdamW", 1e-3), ("LaProp", 1e-3), ("KLShampoo", 1e-3), ("Scion", 1e-3)),
            ("PSGDKron", 1e-3),
        )
    ),
]


def make_gradient(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Return a gradient of the weight's shape, orthogonal to each row and 1 / ‖row‖ as large."""
    noise = torch.randn(weight.shape, generator=generator)
    norms = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    unit = weight / norms
    return (noise - (noise * unit).sum(1, keepdim=True) * unit) / norms


def start(case: Case, norm: float, rate: float, decay: float) -> tuple[Tensor, Any]:
    """Return a weight whose channels have this norm, and its optimizer."""
    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(SHAPE), dim=1)
    weight = torch.nn.Parameter(rows * norm)
    return weight, case.make(weight, rate, decay)


def take_steps(
    optimizer: Any, weight: Tensor, steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return (steps, C) the norms after each step, and the angles that it turned the channels."""
    norms, angles = [], []
    for _ in range(steps):
        before = weight.detach().clone()
        weight.grad = make_gradient(before, generator)
        optimizer.step()
        vectors = before, weight.detach(), weight.detach() - before
        lengths = [torch.linalg.vector_norm(x, dim=1) for x in vectors]
        norms.append(lengths[1])
        angles.append(rotations(*lengths))
    return torch.stack(norms), torch.stack(angles)


def root_mean_square(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def measure_power(case: Case, steps: int = 100) -> float:
    """Return −d ln(rotation) / d ln ‖w‖ without weight decay, at rates that turn it by 1e-3."""
    turned = []
    for norm in NORMS:
        rate, angle = case.rate * norm**2, SMALL_ANGLE
        for _ in range(2):
            rate *= SMALL_ANGLE / angle
            weight, optimizer = start(case, norm, rate, 0.0)
            _, angles = take_steps(optimizer, weight, steps, torch.Generator().manual_seed(1))
            angle = root_mean_square(angles[steps // 2 :])
        turned.append(angle / rate)
    return math.log(turned[0] / turned[1]) / math.log(NORMS[1] / NORMS[0])


def measure_equilibrium(case: Case, steps: int) -> dict[str, float | None]:
    """Return norm and rotation over the last half of the steps, beside the expected rotation."""
    decay = PRODUCT / case.rate
    weight, optimizer = start(case, math.sqrt(case.rate * SHAPE[1] / (2 * decay)), case.rate, decay)
    generator = torch.Generator().manual_seed(1)
    take_steps(optimizer, weight, steps // 2, generator)
    norms, angles = take_steps(optimizer, weight, steps // 2, generator)
    third = len(norms) // 3
    drift = math.log(root_mean_square(norms[-third:]) / root_mean_square(norms[:third]))
    return {
        "norm": root_mean_square(norms),
        "rotation": root_mean_square(angles) / math.sqrt(2 * PRODUCT),
        "drift": drift,
        "expected": (found := expected_rotation(optimizer, optimizer.param_groups[0]))
        and found / math.sqrt(2 * PRODUCT),
    }


def measure(case: Case, steps: int) -> dict[str, Any]:
    """Return all that is measured of an optimizer, or the error that it ends with."""
    package = case.package.partition(".")[0]
    row: dict[str, Any] = {"case": str(case), "package": f"{package} {version(package)}"}
    try:
        row["known"] = known_power(start(case, 1.0, case.rate, 0.0)[1])
        row["power"] = measure_power(case)
        row |= measure_equilibrium(case, steps)
    except Exception as error:  # whatever a package raises is its row
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return row


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| optimizer | power | rotation / √(2ηλ) | by the formula | ‖w_i‖ |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| `{row['case']}` | {row['error']} | | | |")
            continue
        settled = abs(row["drift"]) < SETTLED and row["rotation"] > SETTLED
        rotation = f"{row['rotation']:.3f}" if settled else "not settled"
        norm = f"{row['norm']:.3g}" if settled else f"changes by {math.expm1(row['drift']):+.0%}"
        expected = "–" if row["expected"] is None else f"{row['expected']:.3f}"
        cells = f"`{row['case']}`", f"{abs(row['power']):.2f}", rotation, expected, norm
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=[], help="packages or optimizers")
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--write", type=Path, help="a page whose table is replaced")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    kept = options.rows.read_text("utf-8") if options.rows and options.rows.is_file() else ""
    rows = {row["case"]: row for row in map(json.loads, kept.splitlines())}
    for case in CASES:
        chosen = not options.only or {case.package, str(case)} & set(options.only)
        if str(case) in rows or not chosen or not find_spec(case.package.split(".")[0]):
            continue
        rows[str(case)] = row = measure(case, options.steps)
        print(json.dumps(row), flush=True)
        if options.rows:
            with options.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    print(table(list(rows.values())))
    if options.write:
        page = options.write.read_text("utf-8")
        before, after = page.split(_BEGIN)[0], page.split(_END)[1]
        text = f"{before}{_BEGIN}\n\n{table(list(rows.values()))}\n\n{_END}{after}"
        options.write.write_text(text, "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
