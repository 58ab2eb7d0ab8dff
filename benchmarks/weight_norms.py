"""Time of recording, logging and steering, as shares of a training step of the same network.

    python benchmarks/weight_norms.py [--net resnet56 | transformer] [--batch 128] [--device cuda]
        [--rounds 10] [--tracking]

The step and each addition to it take turns (see `interleaved`); a share is the time of an addition
against that of the step in the same round. What is logged is written for TensorBoard; by default
that happens at every 50th step. `--tracking` times what `track_norms` adds instead, beside a loop
of `weight.norm().item()` and, where it is installed, a step of such a network under
`wandb.watch(log="all", log_freq=1)` offline, which logs histograms of weights and gradients.
The transformer is the base model, on 32 pairs of 32 tokens.
"""

import argparse
import functools
import importlib
import os
import tempfile
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from interleaved import Call, quartiles_of_ratio, time_rounds
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn
from training_step import NETS, Step, make_step
from translation import make_step as make_translation_step

from nmlightning.callbacks.norm_dashboard import NormDashboard
from nmlightning.kernels.dispatch import weight_kernels
from nmlightning.models import Transformer
from nmlightning.optim import DecayEquivalentLR, LRCorrection, NormSchedule
from nmlightning.tracking.step_meter import QUANTITIES, StepMeter
from nmlightning.weights.channel_norms import channel_norms
from nmlightning.weights.history import NormHistory
from nmlightning.weights.layer_weights import find_layer_weights
from nmlightning.weights.recorder import Recorder

VOCABULARY, SENTENCES = 32_000, (32, 32)


def main() -> None:
    """Print a line for each of what callbacks add to a step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", choices=[*NETS, "transformer"], default="resnet56")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tracking", action="store_true")
    o = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {o.device}, {o.net}, batch {o.batch}, {threads} threads")
    make = functools.partial(make_step, o.net, o.batch, o.device)
    step = make_transformer_step() if o.net == "transformer" else make()
    step.run()
    if o.tracking:
        calls = make_tracking(step)
        if find_spec("wandb") and o.net != "transformer":
            calls["a step under wandb.watch"] = make_watched(make())
    else:
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


def make_tracking(step: Step) -> dict[str, Call]:
    """Return what `track_norms` does around a step, without the step, and what others do."""
    steps = ("weight_norm", "step_norm", "rotation")
    chosen = {
        "norms": ("weight_norm",),
        "norms, steps, rotations": steps,
        "the same and gradients": (*steps, "gradient_norm", "update_ratio"),
        "all quantities": QUANTITIES,
    }
    calls = {f"{name}, logged": make_meter(step, names) for name, names in chosen.items()}
    calls["norms, steps, rotations, recorded"] = make_meter(step, steps, logs=False)

    def read_each() -> None:
        for q in step.net.parameters():
            q.norm().item()

    calls["p.norm().item() of each parameter"] = read_each
    return calls


def make_transformer_step() -> Step:
    """Return a step of the base model with Adam."""
    net = Transformer(VOCABULARY)
    return Step(net, torch.optim.Adam(net.parameters()), make_translation_step(net, *SENTENCES))


def make_meter(step: Step, quantities: Sequence[str], *, logs: bool = True) -> Call:
    """Return what a tracker's hooks call around a step that is due."""
    recorded = [name for name in quantities if name != "weight_norm"]
    recorder = Recorder(find_layer_weights(step.net), {}, None, weight_kernels, recorded)
    meter = StepMeter(recorder, quantities)

    def run() -> None:
        meter.begin(step.optimizer)
        meter.measure()
        meter.measure_step(step.optimizer)
        values = meter.finish()
        recorder.record(recorder.last_step + 1, 0, {}, values, meter.norms)
        if logs:
            meter.read()
        meter.forget()

    return run


def make_watched(step: Step) -> Call:
    """Return a step of a network that Weights & Biases watches."""
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    wandb = importlib.import_module("wandb")
    run = wandb.init(project="benchmark", dir=tempfile.mkdtemp())
    run.watch(step.net, log="all", log_freq=1)

    def take() -> None:
        step.run()
        run.log({})

    return take


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
