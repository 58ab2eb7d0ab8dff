"""Time of recording, logging and steering, as shares of a training step of the same network.

    python benchmarks/weight_norms.py [--net resnet56] [--batch 128] [--device cuda] [--rounds 10]

The step and each addition to it take turns (see `interleaved`); a share is the time of an addition
against that of the step in the same round. What is logged is written for TensorBoard; by default
that happens at every 50th step.
"""

import argparse
import tempfile
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from interleaved import Call, quartiles_of_ratio, time_rounds
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn
from training_step import NETS, make_step

from nmlightning.callbacks.norm_dashboard import NormDashboard
from nmlightning.kernels.dispatch import weight_kernels
from nmlightning.optim import DecayEquivalentLR, LRCorrection, NormSchedule
from nmlightning.tracking.step_meter import StepMeter
from nmlightning.weights.channel_norms import channel_norms
from nmlightning.weights.history import NormHistory
from nmlightning.weights.layer_weights import find_layer_weights
from nmlightning.weights.recorder import Recorder


def main() -> None:
    """Print a line for each of what callbacks add to a step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", choices=NETS, default="resnet56")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=10)
    o = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {o.device}, {o.net}, batch {o.batch}, {threads} threads")
    step = make_step(o.net, o.batch, o.device)
    step.run()
    calls = {"record": make_record(step.net), "log": make_log(step.net, step.optimizer)}
    calls |= make_steering(step.net, step.optimizer)
    times = time_rounds({"": step.run, **calls}, o.rounds, device=o.device)
    for name in calls:
        low, middle, high = (100 * share for share in quartiles_of_ratio(times, name, to=""))
        print(f"{name:24} {middle:6.2f} % of a step ({low:.2f} to {high:.2f})")


def make_record(net: nn.Module) -> Call:
    """Return what takes one record of all weights, at the next step."""
    recorder = Recorder(find_layer_weights(net), {}, kernels=weight_kernels)
    return lambda: recorder.record(recorder.last_step + 1, 0, {})


def make_log(net: nn.Module, optimizer: torch.optim.Optimizer) -> Call:
    """Return what a logged step takes: weights are kept before it, read and written after it."""
    trainer: Any = SimpleNamespace(
        loggers=[TensorBoardLogger(tempfile.mkdtemp())],
        optimizers=[optimizer],
        precision_plugin=None,
        is_global_zero=True,
        logged_metrics={},
        fast_dev_run=True,
        _logger_connector=SimpleNamespace(should_update_logs=True),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=0)),
    )
    meter = StepMeter(Recorder(find_layer_weights(net), {}, kernels=weight_kernels))
    dashboard = NormDashboard(trainer, meter)

    def run() -> None:
        meter.begin(optimizer)
        dashboard.after_batch()

    return run


def make_steering(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Call]:
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
) -> Call:
    """Return a call of the rule's two hooks."""
    handle = rule.attach(optimizer, net.named_parameters())
    handle.remove()

    def run() -> None:
        handle.before_step((), {})
        handle.after_step()

    return run


if __name__ == "__main__":
    main()
