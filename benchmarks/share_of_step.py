"""Measures the time that additions to a training step take, as a share of that step.

A plain step and each addition to it take turns (see `interleaved`); a share is the time of an
addition against that of the step in the same round.
"""

import argparse
from collections.abc import Callable, Mapping

import torch
from interleaved import Call, quartiles_of_ratio, time_rounds
from training_step import NETS, Step, make_step


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
    times = time_rounds({"": step.run, **additions}, options.rounds, device=options.device)
    for name in additions:
        low, middle, high = (100 * share for share in quartiles_of_ratio(times, name, to=""))
        print(f"{name:24} {middle:6.2f} % of a step ({low:.2f} to {high:.2f})")
