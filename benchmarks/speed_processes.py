"""N1, N8, N12 and C9's epoch: processes that take turns, for what differs between processes.

Some live long, and take a sample whenever they are told to; those of N12 are started anew. Memory
that is freed is kept by `nmlightning.allocator` where `kept` says so, else as glibc has it.
"""

import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any

import pytorch_lightning as pl
from epoch_by_trainer import make_loop, make_trainer
from interleaved import Call
from norm_layers import LAYOUTS
from plain_training import Tutorial
from sampled import SETTLED, Pace, Rounds, Sample, Stopwatch, sample, sample_all, set_threads
from speed_data import RandomCIFAR, measure_data, torchvision_loader
from speed_plan import TYPES, Plan
from speed_tables import format_figure
from targets import Bound, Measurement, Result
from torch import optim
from training_step import NETS, draw_images, make_step_of

from nmlightning import ImageClassifier, NormSwap
from nmlightning.allocator import keep_freed_memory

HERE = Path(__file__).parent
STEPS = (("fp32", "NCHW"), ("fp32", "NHWC"), ("bf16", "NHWC"))
STEP_BATCH = 64  # of N1
DOCTOR = """
import sys
from unittest import mock
from nmlightning.cli import main
with mock.patch("nmlightning.commands.doctor._print_times"):
    sys.exit(main(["doctor"]))
"""
MALLOC = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def measure_allocator(plan: Plan, targets: Set[str]) -> Iterator[Result]:
    """Yield N1: a step of a network where freed memory is kept, and where it is not."""
    batch = min(STEP_BATCH, plan.batch)
    for dtype, layout in STEPS:
        setting = {"dtype": dtype, "layout": layout, "net": plan.small_net, "batch": batch}
        processes = {n: Process("step", kept=n == "own", **setting) for n in ("own", "")}
        rounds = sample_processes(processes, plan.net_pace)
        what = f"step with freed memory kept / given back, {dtype} {layout}"
        case = f"{plan.small_net}, batch {batch}, BN"
        yield Measurement("N1", what, case, "", rounds.figure("own", to=""), Bound(0.9))


def measure_fits(plan: Plan, targets: Set[str]) -> Iterator[Result]:
    """Yield N8, and C9 with the data alone."""
    epoch = {"net": plan.small_net, "steps": plan.steps, "batch": plan.batch}
    if "N8" in targets:
        fits = {n: Process(n, kept=n == "best", **epoch) for n in ("best", "plain")}
        rounds = sample_processes(fits, plan.net_pace)
        speed = format_figure(plan.steps * plan.batch / rounds.seconds("best"), "images/s")
        case = f"{plan.small_net}, batch {plan.batch}, {speed} with all threads"
        what = "plain Lightning, torchvision's pipeline, BN in fp32 / best recipe"
        figure, least = rounds.figure("plain", to="best"), Bound(2.3, is_least=True)
        yield Measurement("N8", what, case, "", figure, least)
    if "C9" in targets:
        yield measure_data(plan)
        fits = {n: Process(n, kept=True, **epoch) for n in ("trainer", "loop")}
        figure = sample_processes(fits, plan.net_pace).figure("trainer", to="loop")
        case = f"{plan.small_net} with BN, {plan.steps} steps, batch {plan.batch}"
        yield Measurement("C9", "epoch by Trainer.fit / bare loop", case, "", figure, Bound(1.1))


def measure_starts(plan: Plan, targets: Set[str]) -> Iterator[Result]:
    """Yield N12: whole processes, which use one thread until a first step."""
    end = ("--trainer.callbacks+", "plain_training.EndAtFirstStep")
    commands = {
        "import": ("-c", "import torch, pytorch_lightning"),
        "doctor": ("-c", DOCTOR),
        "plain": (str(HERE / "plain_training.py"),),
        "fit": ("-m", "nmlightning", "fit", "--config", "quickstart", *end),
    }
    pace = plan.net_pace._replace(block=0, threads=plan.pace.threads[-1:])
    with tempfile.TemporaryDirectory() as folder:
        starts = {name: partial(start, words, folder) for name, words in commands.items()}
        rounds = sample_all(starts, pace)
    for name, other, what, bound in (
        ("doctor", "import", "nm doctor without times / import of torch and Lightning", 1.3),
        ("fit", "plain", "nm fit until the first step / plain Lightning", 1.2),
    ):
        figure = rounds.figure(name, to=other)
        yield Measurement("N12", what, f"{rounds.seconds(name):.1f} s", "", figure, Bound(bound))


def start(words: Sequence[str], folder: str, threads: int, calls: int) -> Sample:
    """Run a Python process in a folder until it ends."""
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths}
    started = time.perf_counter()
    quiet = {"stdin": DEVNULL, "stdout": DEVNULL, "stderr": DEVNULL}
    process = Popen([sys.executable, *words], cwd=folder, env=environment, **quiet)
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, words
    return Sample(wall, used.ru_utime + used.ru_stime, used.ru_minflt)


class Process:
    """Another process, which samples a call of its own."""

    def __init__(self, kind: str, **arguments: object) -> None:
        words = [sys.executable, __file__, json.dumps([kind, arguments])]
        environment = {name: value for name, value in os.environ.items() if name not in MALLOC}
        paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        environment["PYTHONPATH"] = paths
        self.process = Popen(words, stdin=PIPE, stdout=PIPE, text=True, env=environment)

    def __call__(self, threads: int, calls: int) -> Sample:
        assert self.process.stdin
        assert self.process.stdout
        print(threads, calls, file=self.process.stdin, flush=True)
        taken = Sample(*json.loads(self.process.stdout.readline()))
        time.sleep(SETTLED)  # until its threads leave the cores to others
        return taken


def sample_processes(processes: Mapping[str, Process], pace: Pace) -> Rounds:
    """Sample processes in turns, and end them."""
    try:
        return sample_all(processes, pace)
    finally:
        for each in processes.values():
            each.process.communicate()


def main() -> None:
    """Be the other process, until nobody asks any more."""
    kind, arguments = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Lightning prints is no answer
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    if arguments.pop("kept"):
        assert keep_freed_memory()
    KINDS[kind](partial(_answer, answers), **arguments)


def _answer(file: Any, taken: Sample) -> None:
    print(json.dumps(taken), file=file, flush=True)


def _ask() -> tuple[int, int]:
    words = sys.stdin.readline().split()
    if not words:
        os._exit(0)  # from within a fit, too
    return int(words[0]), int(words[1])


def serve(answer: Callable[[Sample], None], call: Call) -> None:
    """Sample a call whenever it is asked for."""
    while True:
        answer(sample(call, *_ask()))


class Serve(pl.Callback):
    """Samples the epochs of a fit: all from the start of one to that of the next."""

    def __init__(self, answer: Callable[[Sample], None]) -> None:
        self.answer = answer
        self.watch: Stopwatch | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.watch is not None:
            self.answer(self.watch.read())
        set_threads(_ask()[0])
        self.watch = Stopwatch()


def serve_step(answer: Any, dtype: str, layout: str, net: str, batch: int) -> None:
    """Serve a training step."""
    images = draw_images(net, batch, memory_format=LAYOUTS[layout])
    model = NETS[net][0]().to(memory_format=LAYOUTS[layout])
    serve(answer, make_step_of(model, images, TYPES[dtype] if dtype != "fp32" else None).run)


def serve_fit(answer: Any, net: str, steps: int, batch: int, kind: str) -> None:
    """Serve the epochs of a fit, by the best recipe, by batch norm in fp32, or as in a tutorial."""
    data: Any = RandomCIFAR(steps * batch, batch)
    callbacks: list[pl.Callback] = [Serve(answer)]
    model = NETS[net][0]()
    task: pl.LightningModule = Tutorial(model)
    if kind == "plain":
        data = torchvision_loader(data.train.images, data.train.labels, batch)
    else:
        make = partial(optim.SGD, lr=0.01, momentum=0.9)
        task = ImageClassifier(model, make, channels_last=kind == "best")
    if kind == "best":
        callbacks.append(NormSwap("l1", fuse="add_relu"))
    precision = "bf16-mixed" if kind == "best" else "32-true"
    make_trainer("cpu", -1, *callbacks, limit_val_batches=0, precision=precision).fit(task, data)


def serve_loop(answer: Any, net: str, steps: int, batch: int) -> None:
    """Serve epochs of a loop with nothing around it."""
    serve(answer, make_loop(NETS[net][0](), RandomCIFAR(steps * batch, batch), "cpu"))


KINDS: dict[str, Callable[..., None]] = {
    "step": serve_step,
    "loop": serve_loop,
    **{kind: partial(serve_fit, kind=kind) for kind in ("best", "plain", "trainer")},
}

if __name__ == "__main__":
    main()
