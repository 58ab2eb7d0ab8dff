"""Samples calls that take turns, and throws away the rounds in which a busy machine disturbed them.

In every round each call runs with one thread and with all, in an order drawn anew, as often in a
row as fills `Pace.block` seconds, of which the mean counts. CPU time is compared where there is one
thread, wall time where there are several. A process uses a share of what it could: its CPU time /
(threads × wall time). Two rules make of it which rounds count, for each number of threads:

1. A yardstick, torch's multiplication of a million numbers, keeps all threads busy. Where its share
   is below `Pace.share`, somebody else had the cores, though every round looks alike.
2. A call that is Python in parts cannot reach all. Where its share is below `Pace.share` of what it
   has in the best quarter of the rounds, it was interrupted.

More rounds take the place of those thrown away, up to twice as many as wanted.
"""

import math
import random
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from interleaved import Call, Quartiles, quartiles_of

YARDSTICK = "yardstick"
NONE = Quartiles(math.nan, math.nan, math.nan)  # too few rounds for a figure
SETTLED = 0.02  # seconds, after which threads that are no longer wanted sleep


class Pace(NamedTuple):
    """How much is sampled.

    Attributes:
        rounds: that are wanted; twice as many are tried at most.
        block: the seconds that a call is repeated for. CPU time of other threads is known to a tick
            of the scheduler, 4 ms, so a block has many.
        share: that a call has to use of what it can.
        least: rounds without which there is no figure.
        threads: the numbers of threads; by default one and torch's.
    """

    rounds: int = 5
    block: float = 0.05
    share: float = 0.9
    least: int = 5
    threads: tuple[int, ...] = tuple(sorted({1, torch.get_num_threads()}))


class Sample(NamedTuple):
    """What one call took: seconds of wall and of CPU time, and page faults."""

    wall: float
    cpu: float
    faults: float


Sampler = Callable[[int, int], Sample]  # by the number of threads and of calls in a row


class Stopwatch:
    """Reads what this process took since it was made."""

    def __init__(self) -> None:
        self.started = self._now()

    def read(self, calls: int = 1) -> Sample:
        """Return the mean of so many calls."""
        return Sample(*((b - a) / calls for a, b in zip(self.started, self._now(), strict=True)))

    def _now(self) -> tuple[float, float, int]:
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        return time.perf_counter(), time.process_time(), faults


def sample(call: Call, threads: int, calls: int) -> Sample:
    """Sample a call in this process."""
    set_threads(threads)
    watch = Stopwatch()
    for _ in range(calls):
        call()
    return watch.read(calls)


def set_threads(threads: int) -> None:
    """Let torch use so many threads, and wait until the others sleep."""
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
        time.sleep(SETTLED)


class Figure(NamedTuple):
    """A ratio of CPU times with one thread, and one of wall times with all.

    Attributes:
        cpu, wall: the quartiles; not a number where too few rounds were kept.
        kept, tried: rounds for each of both.
        faults: page faults of a call and of its rival, with all threads.
    """

    cpu: Quartiles
    wall: Quartiles
    kept: tuple[int, int]
    tried: tuple[int, int]
    faults: tuple[float, float]

    def times(self, factor: float) -> "Figure":
        """Return the ratio in another unit."""
        cpu, wall = (Quartiles(*(factor * value for value in q)) for q in self[:2])
        return self._replace(cpu=cpu, wall=wall)


class Rounds:
    """The samples of calls that took turns: for each number of threads, by name."""

    def __init__(self, pace: Pace, names: Sequence[str]) -> None:
        self.pace = pace
        self.samples: dict[int, dict[str, list[Sample]]] = {
            threads: {name: [] for name in names} for threads in pace.threads
        }

    def kept(self, threads: int) -> list[int]:
        """Return the rounds that count."""
        shares = {
            name: [min(1.0, s.cpu / s.wall / threads) for s in samples]
            for name, samples in self.samples[threads].items()
        }
        return undisturbed(shares, self.pace.share)

    def seconds(self, name: str) -> float:
        """Return the median wall time of a call with all threads; NaN of too few rounds."""
        threads = self.pace.threads[-1]
        kept = self.kept(threads)
        walls = [self.samples[threads][name][i].wall for i in kept]
        return statistics.median(walls) if len(kept) >= self.pace.least else math.nan

    def figure(self, name: str, to: str) -> Figure:
        """Return a call's ratio to another of the same round."""
        ends = self.pace.threads[0], self.pace.threads[-1]
        kept = [self.kept(threads) for threads in ends]
        spreads = []
        for threads, rounds, field in zip(ends, kept, ("cpu", "wall"), strict=True):
            own, other = (self.samples[threads][call] for call in (name, to))
            ratios = [getattr(own[i], field) / getattr(other[i], field) for i in rounds]
            spreads.append(quartiles_of(ratios) if len(ratios) >= self.pace.least else NONE)
        faults = [statistics.median(s.faults for s in self.samples[ends[1]][c]) for c in (name, to)]
        tried = tuple(len(self.samples[threads][name]) for threads in ends)
        return Figure(*spreads, tuple(map(len, kept)), tried, tuple(faults))


def undisturbed(shares: Mapping[str, Sequence[float]], least: float) -> list[int]:
    """Return the rounds in which nothing disturbed any call, by the shares that they used."""
    rounds = [i for i, share in enumerate(shares[YARDSTICK]) if share >= least]
    for values in shares.values():
        best = sorted((values[i] for i in rounds), reverse=True)
        rounds = [i for i in rounds if values[i] >= least * best[len(best) // 4]]
    return rounds


def sample_rounds(calls: Mapping[str, Call], pace: Pace) -> Rounds:
    """Sample calls of this process."""
    return sample_all({name: partial(sample, call) for name, call in calls.items()}, pace)


def sample_all(samplers: Mapping[str, Sampler], pace: Pace) -> Rounds:
    """Sample calls wherever they run, until enough rounds count for each number of threads."""
    samplers = {YARDSTICK: partial(sample, make_yardstick()), **samplers}
    before = torch.get_num_threads()
    blocks = dict.fromkeys(samplers, pace.block)
    if pace.share:  # a shorter one has no share, whatever the others are
        blocks[YARDSTICK] = max(pace.block, Pace().block)
    calls = {t: {n: warm_up(s, t, blocks[n]) for n, s in samplers.items()} for t in pace.threads}
    rounds = Rounds(pace, list(samplers))
    for _ in range(2 * pace.rounds):
        due = [t for t in pace.threads if len(rounds.kept(t)) < pace.rounds]
        for threads in random.sample(due, len(due)):
            for name in random.sample(list(samplers), len(samplers)):
                taken = samplers[name](threads, calls[threads][name])
                rounds.samples[threads][name].append(taken)
    torch.set_num_threads(before)
    return rounds


def warm_up(sampler: Sampler, threads: int, block: float) -> int:
    """Compile, allocate and fill caches; return how many calls fill a block."""
    sampler(threads, 1)
    return max(1, math.ceil(block / sampler(threads, 1).wall))


@cache
def make_yardstick() -> Call:
    """Return what keeps all threads busy and depends on nothing else."""
    a, b, product = torch.ones(3, 2**20)
    return partial(torch.mul, a, b, out=product)
