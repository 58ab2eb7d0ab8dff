"""What something adds to a training step, measured as a share of that step.

In every round a plain step is timed, and in random order each addition to it. A share is the median
over rounds of its time against that of the step in the same round, with its quartiles, so that a
noisy machine disturbs both.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.optim import Optimizer

from nmlightning.models import VGG, CifarResNet

NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet20": (lambda: CifarResNet(20), 32),
    "resnet56": (lambda: CifarResNet(56), 32),
    "vgg11": (lambda: VGG(11), 32),
    "resnet50": (torchvision.models.resnet50, 224),
}
WARM_UP_ROUNDS = 2

Call = Callable[[], object]


@dataclass(frozen=True)
class Step:
    """A network, its optimizer, and one step of training it."""

    net: nn.Module
    optimizer: Optimizer
    run: Call


def main(description: str, make_additions: Callable[[Step], Mapping[str, Call]]) -> None:
    """Read the options, and print a line for each addition."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--net", choices=NETS, default="resnet56")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    print(
        f"torch {torch.__version__}, {options.device}, {options.net}, batch {options.batch}, "
        f"{torch.get_num_threads()} threads"
    )
    step = make_step(options.net, options.batch, options.device)
    step.run()
    additions = make_additions(step)
    for name, shares in measure(step.run, additions, options.device, options.rounds).items():
        low, middle, high = statistics.quantiles(shares, n=4)
        print(f"{name:24} {100 * middle:6.2f} % of a step ({100 * low:.2f} to {100 * high:.2f})")


def make_step(net_name: str, batch: int, device: str) -> Step:
    """Return a step of a network on random images."""
    make_net, size = NETS[net_name]
    net = make_net().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    x = torch.randn(batch, 3, size, size, device=device)
    target = torch.randint(10, (batch,), device=device)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), target).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return Step(net, optimizer, run)


def measure(
    step: Call, additions: Mapping[str, Call], device: str, rounds: int
) -> dict[str, list[float]]:
    """Return the share of a step that each addition takes, in each round after the warm-up."""
    shares: dict[str, list[float]] = {name: [] for name in additions}
    for current in range(rounds + WARM_UP_ROUNDS):
        whole = seconds_of(step, device)
        for name in random.sample(list(additions), len(additions)):
            share = seconds_of(additions[name], device) / whole
            if current >= WARM_UP_ROUNDS:
                shares[name].append(share)
    return shares


def seconds_of(call: Call, device: str) -> float:
    """Return how long the call takes, on the device too."""
    started = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
