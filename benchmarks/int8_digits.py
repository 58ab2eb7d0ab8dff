"""Trains a small network on digits with gradients of 8, 4 and 2 bits, with and without the tricks.

    python benchmarks/int8_digits.py [--batch 128] [--seeds 5] [--epochs 4] [--only NAME …]

A loop of one's own: `swap_int8` before the optimizer is made, all else as in float. scikit-learn's
1,797 digits, of which 360, stratified and always the same, are the test. Each row has its accuracy,
as trained and with running statistics and ranges taken anew: mean and deviation over seeds, which
change initialisation, order and rounding; then each seed as trained.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LinearLR
from torch.optim.swa_utils import update_bn

from nmlightning import swap_int8, swap_norms
from nmlightning.reports.formatting import MeanStd, format_mean_std

Swap = Callable[[nn.Module], object]
NEITHER: Any = {"rounding": "nearest", "bifurcate": False}
# Bits of inputs and weights, then of gradients. Range batch norm, where no other is named.
ROWS: dict[str, Swap] = {
    "float, batch norm": lambda net: None,
    "float": partial(swap_norms, norm="range", options={"constant": "official"}),
    "8/8 both": swap_int8,
    "8/8 neither": partial(swap_int8, **NEITHER),
    "8/4 both": partial(swap_int8, gradient_bits=4),
    "8/4 neither": partial(swap_int8, gradient_bits=4, **NEITHER),
    "8/2 both": partial(swap_int8, gradient_bits=2),
    "8/2 bifurcated": partial(swap_int8, gradient_bits=2, rounding="nearest"),
    "8/2 stochastic": partial(swap_int8, gradient_bits=2, bifurcate=False),
    "8/2 neither": partial(swap_int8, gradient_bits=2, **NEITHER),
    "float, L1": partial(swap_norms, norm="l1"),
    "8/8 both, L1": partial(swap_int8, norms="l1"),
    "8/4 both, L1": partial(swap_int8, gradient_bits=4, norms="l1"),
    "8/4 neither, L1": partial(swap_int8, gradient_bits=4, norms="l1", **NEITHER),
}


def make_network() -> nn.Sequential:
    """Return five 3×3 convolutions with batch norms, and a linear layer, for (N, 1, 8, 8)."""
    parts: list[nn.Module] = []
    widths = (1, 16, 16, 32, 32, 64)
    for inputs, outputs, stride in zip(widths, widths[1:], (1, 1, 2, 1, 2), strict=False):
        parts.append(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False))
        parts += [nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def load_split() -> list[Tensor]:
    """Return images to train and to test with, then their labels."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images[:, None]).float(), torch.tensor(digits.target)
    images = (images - images.mean()) / images.std()
    return list(train_test_split(images, labels, test_size=360, stratify=labels, random_state=0))


def train(swap: Swap, seed: int, batch_size: int, epochs: int) -> tuple[float, float]:
    """Return the test accuracy as trained, and with the running statistics taken anew."""
    images, test, labels, test_labels = load_split()
    batches = len(images) // batch_size  # full ones
    torch.manual_seed(seed)
    net = make_network()
    swap(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = LinearLR(optimizer, 1.0, 0.0, epochs * batches)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(batch_size)[:batches]:
            optimizer.zero_grad()
            cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    trained = measure(net, test, test_labels)
    order = torch.cat([torch.randperm(len(images)) for _ in range(4)])
    update_bn([images[rows] for rows in order.split(batch_size)[:-1]], net)
    return trained, measure(net, test, test_labels)


@torch.no_grad()
def measure(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that get their label in evaluation."""
    right = (net.eval()(images).argmax(1) == labels).float().mean()
    net.train()
    return right.item()


def main() -> None:
    """Print a line for each row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option, default in (("batch", 128), ("seeds", 5), ("epochs", 4)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    given = parser.parse_args()
    for name in given.only:
        found = [train(ROWS[name], 1 + i, given.batch, given.epochs) for i in range(given.seeds)]
        both = [format_mean_std(MeanStd.of(each), "top1") for each in zip(*found, strict=True)]
        each = " ".join(f"{100 * trained:.2f}" for trained, _ in found)
        print(f"{name:<18}{both[0]:>16}{both[1]:>16}   {each}", flush=True)


if __name__ == "__main__":
    main()
