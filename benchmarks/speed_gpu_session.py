"""The first minutes on a GPU: each kernel against float64, then H1 to H7, then trainings at once.

    python benchmarks/speed_gpu_session.py OUT [STAGE:SECONDS ...] [--quick] [--data-root data]

Every result is a line of JSON in OUT/results.jsonl as soon as it is known. A stage that fails or
takes longer is reported, and the next begins. The trainings are those of results/plan_gpu.yaml,
whose curves are in OUT/runs. With --quick all runs on a CPU, which finds mistakes and measures
nothing. attorch is a rival where its checkout is on PYTHONPATH.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from interleaved import Call
from speed import ON_GPU, describe_machine
from speed_plan import QUICK, Plan, Shape

from nmlightning.functional.statistics import LargestMean, PowerMean
from nmlightning.kernels.interface import NormSpec

ROOT = Path(__file__).parents[1]
PLAN = ROOT / "results/plan_gpu.yaml"
STAGES = {"compile": 60, "correct": 60, "layers": 90, "steps": 110, "train": 320}
STATISTICS = (PowerMean(1.0), LargestMean(1), LargestMean(10))
SHORT = "--data Digits --data.image_size 32 --data.batch_size 8 --trainer.max_epochs 1"
LIMITS = "--trainer.limit_train_batches 2 --trainer.limit_val_batches 1 --trainer.accelerator cpu"


def main() -> None:
    """Run the stages that were asked for, each in a process of its own that ends at its limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("stages", nargs="*", default=[f"{n}:{s}" for n, s in STAGES.items()])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--data-root", type=Path, default=ROOT / "data")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.here:
        run_stage(options, options.stages[0])
        return
    paths = [str(ROOT), str(ROOT / "tests/support"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    write(options.out, "machine", lines=describe_machine())
    for name, _, seconds in (stage.partition(":") for stage in options.stages):
        started, limit = time.monotonic(), float(seconds or STAGES[name])
        command = [sys.executable, __file__, str(options.out), f"{name}:{limit}", "--here"]
        command += ["--data-root", str(options.data_root), *(["--quick"] * options.quick)]
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        code: int | str = "stopped"
        with suppress(subprocess.TimeoutExpired):
            try:
                code = process.wait(limit)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # it and what it has started
        write(options.out, "stage", name=name, ended=code, seconds=time.monotonic() - started)


def run_stage(options: argparse.Namespace, stage: str) -> None:
    """Run one stage here."""
    name, _, seconds = stage.partition(":")
    device, plan = ("cpu", QUICK) if options.quick else ("cuda", Plan())
    if name == "compile":
        compile_ahead(options.out, plan, device)
    elif name == "correct":
        check(options.out, device)
    elif name == "train":
        train(options.out, options.data_root, float(seconds), options.quick)
    else:
        for targets, rows in ON_GPU.items():
            if ("H1" in targets) == (name == "layers"):
                for row in rows(plan, set(targets), device):  # type: ignore[call-arg]
                    write(options.out, name, **asdict(row))


def write(out: Path, item: str, **values: Any) -> None:
    """Add a line to the results."""
    line = json.dumps({"item": item, **values}, ensure_ascii=False)
    with (out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


def compile_ahead(out: Path, plan: Plan, device: str) -> None:
    """Fill Triton's cache by all processors at once: a process alone compiles one kernel a time."""
    started = time.monotonic()
    capability, processors = 90, 132
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        capability, processors = 10 * about.major + about.minor, about.multi_processor_count
    jobs = [*product(plan.gpu_shapes, (True, False), STATISTICS, [capability], [processors])]
    jobs = jobs if device == "cuda" else jobs[:1]
    with get_context("spawn").Pool(min(len(jobs), os.cpu_count() or 1)) as pool:
        kernels = sum(pool.map(compile_shape, jobs, chunksize=1))
    write(out, "compiled", kernels=kernels, seconds=time.monotonic() - started)


def compile_shape(job: tuple[Shape, bool, Any, int, int]) -> int:
    """Compile what the layers launch for a shape, by the driver of a GPU that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from nmlightning.kernels.triton import tiles
    from nmlightning.kernels.triton.batch_norm import TritonBatchNorm

    shape, channels_last, statistic, capability, processors = job
    count = 0

    class Ahead:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=None: 0)

    def only_compile(self: Any, grid: Any) -> Call:
        def compile_one(*arguments: Any, **options: Any) -> None:
            nonlocal count
            self.warmup(*arguments, grid=grid, **options)
            count += 1

        return compile_one

    triton.runtime.driver._active = Ahead()
    JITFunction.__getitem__ = only_compile
    tiles.processors_of = lambda device: processors
    torch.set_num_threads(1)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.bfloat16, memory_format=memory_format)
    channel, kernels = torch.ones(shape[1]), TritonBatchNorm()
    for fused in (None, "relu", "add_relu"):
        spec = NormSpec(statistic, 1.25, 1e-5, fused)  # type: ignore[arg-type]
        residual = x if fused == "add_relu" else None
        running = channel, channel, torch.tensor(0), 0.1
        saved = kernels.forward(x, residual, channel, channel, spec, running).saved
        kernels.backward(x, saved, spec)
    return count


def check(out: Path, device: str) -> None:
    """Run the tests on a GPU, most of whose time is compiling, by all processors."""
    tests = "test_triton_on_cuda.py" if device == "cuda" else "test_triton.py"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", f"tests/kernels/{tests}"]
    command += ["-n", str(os.cpu_count())] if device == "cuda" else ["-k", "partition"]
    tests = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    failed = [line for line in tests.stdout.splitlines() if line.startswith("FAILED")]
    write(out, "correct", code=tests.returncode, failed=failed, end=tests.stdout[-200:])


def train(out: Path, data_root: Path, seconds: float, quick: bool) -> NoReturn:
    """Make the runs of the plan, as many at a time as wait for their hosts."""
    plan = yaml.safe_load(PLAN.read_text("utf-8"))
    for table in plan["tables"].values():
        for run in table["runs"].values():
            small = "--model.compile null --model.net.depth 8"
            small = small if "cuda" in run["config"] else "--model.net.width 4"
            run["options"] += [SHORT, LIMITS, small] * quick
    file = out / "plan.yaml"
    file.write_text(yaml.safe_dump(plan), "utf-8")
    command = [str(ROOT / "results/run_plan.py"), "--plan", str(file), "--results", str(out)]
    command += ["--minutes", str((seconds - 15) / 60), "--jobs", "2" if quick else "6"]
    command += ["--niceness", "0", "--data-root", str(data_root)]
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    main()
