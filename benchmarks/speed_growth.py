"""How the cost of a norm grows with batch, channels and layers, and that of recording with layers.

    python benchmarks/speed_growth.py [--rounds 8] [--markdown docs/speed.md]

Two figures are CPU time with one thread, and wall time with all (see `sampled`).
"""

import argparse
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from interleaved import Call
from norm_layers import LAYOUTS, layer_step
from sampled import Figure, Pace, sample_rounds
from speed_layers import draw_input
from speed_networks import swapped
from speed_tables import format_figure, write_markdown
from speed_weights import make_addition
from torch import nn
from training_step import make_step_of
from weight_norms import make_record

from nmlightning import apply_weight_norm
from nmlightning.allocator import keep_freed_memory
from nmlightning.models import CifarResNet
from nmlightning.norms import L1BatchNorm2d

BATCHES, CHANNELS, DEPTHS = (1, 4, 16, 64, 256), (8, 32, 128, 512), (8, 20, 56, 110)
SETTINGS = (("fp32", "NCHW"), ("fp32", "NHWC"), ("bf16", "NHWC"))
ADDED = {
    "step with L1, add and ReLU fused / BN": ("fused", "×"),
    "a record of all norms / step": ("record", "%"),
    "bounded weight norm / step": ("bounded", "%"),
}
Line = tuple[str, Mapping[int, Figure], str]


def main() -> None:
    """Print a line for each sweep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--markdown", type=Path, help="a page, written between its markers")
    options = parser.parse_args()
    keep_freed_memory()
    lines = ["| | one thread, CPU; all threads, wall |", "| --- | --- |"]
    for what, figures, unit in sweep(Pace(options.rounds)):
        cells = (f"{x}: {_format(figure, unit)}" for x, figure in figures.items())
        lines.append(f"| {what} | {' · '.join(cells)} |")
        print(lines[-1], flush=True)
    if options.markdown:
        write_markdown(options.markdown, "growth", "\n".join(lines))


def _format(figure: Figure, unit: str) -> str:
    return "; ".join(format_figure(q.median, unit) for q in (figure.cpu, figure.wall))


def sweep(pace: Pace) -> Iterator[Line]:
    """Yield each line: what is measured, its figures by size, and their unit."""
    for dtype, layout in SETTINGS:
        for name, sizes, shape in (
            ("N in (N, 64, 16, 16)", BATCHES, lambda n: (n, 64, 16, 16)),
            ("C in (32, C, 16, 16)", CHANNELS, lambda c: (32, c, 16, 16)),
        ):
            figures = {n: _layer(shape(n), layout, dtype, pace) for n in sizes}
            yield f"L1 BN / BN, {dtype} {layout}, {name}", figures, "×"
    by_depth = {depth: _network(depth, pace) for depth in DEPTHS}
    for name, (_, unit) in ADDED.items():
        figures = {depth: figures[name] for depth, figures in by_depth.items()}
        yield f"{name}, by layers of a ResNet, batch 32, bf16 NHWC", figures, unit


def _layer(shape: tuple[int, int, int, int], layout: str, dtype: str, pace: Pace) -> Figure:
    x, grad = draw_input(shape, layout, dtype)
    nets = {"L1": L1BatchNorm2d(shape[1]), "BN": nn.BatchNorm2d(shape[1])}
    rounds = sample_rounds({n: layer_step(net, x, grad) for n, net in nets.items()}, pace)
    return rounds.figure("L1", to="BN")


def _network(depth: int, pace: Pace) -> dict[str, Figure]:
    layout = LAYOUTS["NHWC"]
    images = torch.randn(32, 3, 32, 32).contiguous(memory_format=layout)
    plain = CifarResNet(depth)
    calls: dict[str, Call] = {
        "record": make_record(plain),
        "bounded": make_addition(copy.deepcopy(plain), apply_weight_norm),
    }
    for name, net in {"step": plain, "fused": swapped(plain, "add_relu")}.items():
        calls[name] = make_step_of(net.to(memory_format=layout), images, torch.bfloat16).run
    rounds = sample_rounds(calls, pace)
    return {
        what: rounds.figure(name, to="step").times(100 if unit == "%" else 1)
        for what, (name, unit) in ADDED.items()
    }


if __name__ == "__main__":
    main()
