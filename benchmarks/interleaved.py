"""Times calls that take turns, so that a noisy machine disturbs all of them alike.

In every round each call is timed once, in an order drawn anew. A ratio is that of two calls in the
same round; reported is its median over the rounds, with the quartiles.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

Call = Callable[[], object]


class Quartiles(NamedTuple):
    """The first quartile, the median and the third of several rounds."""

    low: float
    median: float
    high: float

    def format(self, template: str = "{:.2f}") -> str:
        """Return the median and, in brackets, the other quartiles."""
        low, median, high = (template.format(value) for value in self)
        return f"{median} ({low} to {high})"


def time_rounds(
    calls: Mapping[str, Call],
    rounds: int,
    *,
    device: str = "cpu",
    warm_up: int = 2,
    repeats: int = 1,
) -> dict[str, list[float]]:
    """Return the seconds of each call in each round after the warm-up.

    Args:
        calls: what is timed, by name.
        rounds: how often each is timed, 2 or more.
        device: where they run; with CUDA its own clock is read.
        warm_up: rounds before those, which compile, allocate and fill caches.
        repeats: calls in a row that are timed as one, of which the mean is taken. On a GPU it hides
            the time that the host takes to launch the first.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for current in range(-warm_up, rounds):
        for name in random.sample(list(calls), len(calls)):
            seconds = seconds_of(calls[name], device, repeats)
            if current >= 0:
                times[name].append(seconds)
    return times


def seconds_of(call: Call, device: str = "cpu", repeats: int = 1) -> float:
    """Return how long a call takes, on the device too: the mean of `repeats` in a row."""
    if device.startswith("cuda"):
        return _seconds_on_gpu(call, device, repeats)
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats


def _seconds_on_gpu(call: Call, device: str, repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record(torch.cuda.current_stream(device))
    for _ in range(repeats):
        call()
    end.record(torch.cuda.current_stream(device))
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end)) / 1e3 / repeats


def quartiles_of(values: Sequence[float]) -> Quartiles:
    """Return the quartiles of two values or more."""
    return Quartiles(*statistics.quantiles(values, n=4))


def quartiles_of_ratio(times: Mapping[str, Sequence[float]], name: str, to: str) -> Quartiles:
    """Return the quartiles of one call's time against another's in the same round."""
    return quartiles_of([own / other for own, other in zip(times[name], times[to], strict=True)])
