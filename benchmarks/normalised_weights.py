"""Time that normalising the weights adds to a training step of the same network.

    python benchmarks/normalised_weights.py [--net resnet56] [--batch 128] [--device cuda]

In every round a plain step is timed, and in random order what each way adds to it: computing all
weights, and the gradients of what they are computed from, once. A share is the median over rounds
of its time against that of the step in the same round, with its quartiles. `torch` is
`torch.nn.utils.parametrizations.weight_norm`, `formula` plain operations under autograd.
"""

import argparse
import copy
import math
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from nmlightning import apply_weight_norm
from nmlightning.models import CifarResNet
from nmlightning.weights.weight_norm import WeightNorm
from nmlightning.weights.weight_norm.normalised_weights import normalise_channels

NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet20": (lambda: CifarResNet(20), 32),
    "resnet56": (lambda: CifarResNet(56), 32),
    "resnet50": (torchvision.models.resnet50, 224),
}
WARM_UP_ROUNDS = 2


class Formula(nn.Module):
    """Bounded weight norm as one writes it down."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("rho", weight.detach().norm() / len(weight) ** 0.5)

    def forward(self, v: Tensor) -> Tensor:
        return normalise_channels(v, self.rho, 2)  # type: ignore[arg-type]


def by_torch(net: nn.Module) -> None:
    """Weight norm by torch."""
    for conv in convs(net):
        parametrizations.weight_norm(conv)


def by_formula(net: nn.Module) -> None:
    """Bounded weight norm without a derivative of its own."""
    for conv in convs(net):
        parametrize.register_parametrization(conv, "weight", Formula(conv.weight))


WAYS: dict[str, Callable[[nn.Module], object]] = {
    "torch": by_torch,
    "formula": by_formula,
    "weight": lambda net: apply_weight_norm(net, "weight"),
    "bounded": apply_weight_norm,
    "weight, cached": lambda net: apply_weight_norm(net, "weight", cache=True),
    "bounded, cached": lambda net: apply_weight_norm(net, cache=True),
    "bounded, L1": lambda net: apply_weight_norm(net, p=1),
    "bounded, L∞": lambda net: apply_weight_norm(net, p=math.inf),
    "bounded, gains": lambda net: apply_weight_norm(net, gain="channel"),
}


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", choices=NETS, default="resnet56")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    print(
        f"torch {torch.__version__}, {options.device}, {options.net}, batch {options.batch}, "
        f"{torch.get_num_threads()} threads"
    )
    for name, shares in measure(options.net, options.batch, options.device, options.rounds).items():
        low, middle, high = statistics.quantiles(shares, n=4)
        print(f"{name:16} {100 * middle:6.2f} % of a step ({100 * low:.2f} to {100 * high:.2f})")


def measure(net_name: str, batch: int, device: str, rounds: int) -> dict[str, list[float]]:
    """Return the share of a step that each way adds, in each round after the warm-up."""
    make_net, size = NETS[net_name]
    net = make_net().to(device)
    step = make_step(net, torch.randn(batch, 3, size, size, device=device))
    additions = {name: make_addition(copy.deepcopy(net), way) for name, way in WAYS.items()}
    projected = copy.deepcopy(net)
    apply_weight_norm(projected, project=True)
    additions["projection"] = make_projection(projected)
    shares: dict[str, list[float]] = {name: [] for name in additions}
    for current in range(rounds + WARM_UP_ROUNDS):
        whole = seconds_of(step, device)
        for name in random.sample(list(additions), len(additions)):
            share = seconds_of(additions[name], device) / whole
            if current >= WARM_UP_ROUNDS:
                shares[name].append(share)
    return shares


def make_step(net: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return a training step."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    target = torch.randint(10, (len(x),), device=x.device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), target).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def make_addition(net: nn.Module, normalise: Callable[[nn.Module], object]) -> Callable[[], None]:
    """Return what computes all weights and the gradients behind them."""
    normalise(net)
    layers = convs(net)
    hidden = [q for layer in layers for q in layer.parametrizations.parameters()]  # type: ignore[union-attr]
    grads = [torch.randn_like(layer.weight) for layer in layers]
    norms = [module for module in net.modules() if isinstance(module, WeightNorm)]

    def run() -> None:
        torch.autograd.grad([layer.weight for layer in layers], hidden, grads)
        for norm in norms:
            norm.after_step(())

    return run


def make_projection(net: nn.Module) -> Callable[[], None]:
    """Return what is due after the step of an optimizer, without that step."""
    parameters = set(net.parameters())
    norms = [layer.parametrizations.weight[0] for layer in convs(net)]  # type: ignore[index, union-attr]

    def run() -> None:
        for norm in norms:
            norm.after_step(parameters)

    return run


def convs(net: nn.Module) -> list[nn.Conv2d]:
    """Return the convolutions."""
    return [module for module in net.modules() if isinstance(module, nn.Conv2d)]


def seconds_of(call: Callable[[], None], device: str) -> float:
    """Return how long the call takes, on the device too."""
    started = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
