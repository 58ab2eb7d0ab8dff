"""Time of recording, logging and steering, as shares of a training step of the same network.

    python benchmarks/weight_norms.py [--net resnet56] [--batch 128] [--device cuda] [--rounds 10]

Each round times a step, and in random order what a callback adds to it; a share is the median over
rounds of its time against that of the step in the same round, with its quartiles. What is logged is
written for TensorBoard; by default that happens at every 50th step.
"""

import argparse
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn

from nmlightning.callbacks.norm_dashboard import NormDashboard
from nmlightning.models import VGG, CifarResNet
from nmlightning.weights.channel_norms import channel_norms
from nmlightning.weights.history import NormHistory
from nmlightning.weights.layer_weights import find_layer_weights
from nmlightning.weights.recorder import Recorder
from nmlightning.weights.steering import DecayEquivalentLR, LRCorrection, NormSchedule

NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet56": (lambda: CifarResNet(56), 32),
    "vgg11": (lambda: VGG(11), 32),
    "resnet50": (torchvision.models.resnet50, 224),
}
WARM_UP_ROUNDS = 2


def main() -> None:
    """Print a line for each addition to the step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", choices=NETS, default="resnet56")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    threads = torch.get_num_threads()
    print(
        f"torch {torch.__version__}, {options.device}, {options.net}, batch {options.batch}, "
        f"{threads} threads"
    )
    for name, shares in measure(options.net, options.batch, options.device, options.rounds).items():
        low, middle, high = statistics.quantiles(shares, n=4)
        print(f"{name:24} {100 * middle:6.2f} % of a step ({100 * low:.2f} to {100 * high:.2f})")


def measure(net_name: str, batch: int, device: str, rounds: int) -> dict[str, list[float]]:
    """Return the share of a step that each addition takes, in each round after the warm-up."""
    make_net, size = NETS[net_name]
    net = make_net().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    x = torch.randn(batch, 3, size, size, device=device)
    target = torch.randint(10, (batch,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), target).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    step()
    additions = {
        "record": make_record(net),
        "log": make_log(net, optimizer),
        **make_steering(net, optimizer),
    }
    shares: dict[str, list[float]] = {name: [] for name in additions}
    for current in range(rounds + WARM_UP_ROUNDS):
        whole = seconds_of(step, device)
        for name in random.sample(list(additions), len(additions)):
            share = seconds_of(additions[name], device) / whole
            if current >= WARM_UP_ROUNDS:
                shares[name].append(share)
    return shares


def make_record(net: nn.Module) -> Callable[[], None]:
    """Return what takes one record of all weights, at the next step."""
    recorder = Recorder(find_layer_weights(net), {})
    return lambda: recorder.record(recorder.last_step + 1, 0, {})


def make_log(net: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Return what a logged step takes: weights are kept before it, read and written after it."""
    trainer: Any = SimpleNamespace(
        loggers=[TensorBoardLogger(tempfile.mkdtemp())],
        optimizers=[optimizer],
        precision_plugin=None,
        is_global_zero=True,
        fast_dev_run=True,
        _logger_connector=SimpleNamespace(should_update_logs=True),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=0)),
    )
    dashboard = NormDashboard(trainer, find_layer_weights(net))

    def run() -> None:
        dashboard.before_step(optimizer)
        dashboard.after_batch([])

    return run


def make_steering(
    net: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Callable[[], None]]:
    """Return what each rule does around a step of the optimizer, without the step."""
    norms = {
        name: channel_norms(weight).cpu()[None].numpy()
        for name, weight in net.named_parameters()
        if weight.dim() == 4
    }
    history = NormHistory.from_arrays(norms, [10**9], [0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rules = {
            "LRCorrection": LRCorrection(history),
            "LRCorrection, paper": LRCorrection(history, mode="paper"),
            "NormSchedule": NormSchedule(history),
            "DecayEquivalentLR": DecayEquivalentLR(1e-4),
        }
    return {name: make_hooks(rule, net, optimizer) for name, rule in rules.items()}


def make_hooks(
    rule: LRCorrection | NormSchedule | DecayEquivalentLR,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> Callable[[], None]:
    """Return a call of the rule's two hooks."""
    attachment = rule.attach(optimizer, net.named_parameters())
    attachment.remove()

    def run() -> None:
        attachment.before_step()
        attachment.after_step()

    return run


def seconds_of(call: Callable[[], None], device: str) -> float:
    """Return how long the call takes, on the device too."""
    started = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
