"""Test `nm fit` in two processes: every way to start them, one run, and what happens when one ends.

All runs are of two epochs of two steps, and those that finish end in the same bits.
"""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from nmlightning.commands.argument_parser import BAD_INPUT, INTERRUPTED, LOST_PROCESS
from quickstart_runs import LAST, SMALL, Answer

WORDS = ["fit", "--config", "quickstart", *SMALL, "--trainer.max_epochs", "2"]
NM = [sys.executable, "-m", "nmlightning", *WORDS]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TWO = ["--trainer.devices", "2"]
RUN = Path("runs/quickstart/version_0")
PATIENCE = 120  # seconds
FATES = '''
import os
import signal
from pathlib import Path

from pytorch_lightning import Callback

from nmlightning.errors import InputError

# Whoever runs the tests in the background hands down a SIGINT that is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)


class Fate(Callback):
    """Does to rank 1, once, what its argument says, in the first step of the second epoch."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        met = Path("met")
        if trainer.global_step == 3 and trainer.global_rank == 1 and not met.exists():
            met.touch()
            if self.how == "raise":
                raise InputError("7.jpg is no image.")
            os.kill(os.getpid(), getattr(signal, self.how))
'''


def start(*words: str, folder: Path, **environment: str) -> "subprocess.Popen[str]":
    """Start a command there, in a process group of its own."""
    mine = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    paths = os.pathsep.join(filter(None, sys.path))
    return subprocess.Popen(
        words,
        cwd=folder,
        env={**mine, "PYTHONPATH": paths, "COLUMNS": "200", "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]") -> Answer:
    """Wait for it; whatever it has started and left is killed."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return Answer(process.returncode, out.splitlines(), err.splitlines())


def free_port() -> str:
    with socket.socket() as each:
        each.bind(("localhost", 0))
        return str(each.getsockname()[1])


def by_lightning(folder: Path) -> list[Answer]:
    return [finish(start(*NM, *TWO, folder=folder))]


def by_torchrun(folder: Path) -> list[Answer]:
    words = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *NM[1:], *TWO]
    return [finish(start(*words, folder=folder))]


def by_two_nodes(folder: Path) -> list[Answer]:
    """Be both nodes, on one machine."""
    master = ["--master-addr", "localhost", "--master-port", free_port()]
    nodes = [
        start(
            *(*TORCHRUN, "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1"),
            *(*master, *NM[1:], "--trainer.devices", "1", "--trainer.num_nodes", "2"),
            folder=folder,
        )
        for node in range(2)
    ]
    return [finish(node) for node in nodes]


def start_by_slurm(folders: list[Path], *words: str) -> list["subprocess.Popen[str]"]:
    """Do what srun does with two tasks on a node."""
    job = {
        **{"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "localhost"},
        **{"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODEID": "0"},
        **{"MASTER_ADDR": "localhost", "MASTER_PORT": free_port()},
    }
    return [
        start(
            *(*NM, *TWO, *words),
            folder=folder,
            **{**job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank, folder in enumerate(folders)
    ]


def by_slurm(folder: Path) -> list[Answer]:
    return [finish(task) for task in start_by_slurm([folder] * 2)]


slow = pytest.mark.slow
WAYS = [
    by_lightning,
    by_torchrun,
    pytest.param(by_two_nodes, marks=slow),
    pytest.param(by_slurm, marks=slow),
]


class Finished(NamedTuple):
    folder: Path
    answers: list[Answer]
    checkpoint: Any


def finish_by(way: Callable[[Path], list[Answer]], folder: Path) -> Finished:
    answers = way(folder)
    assert [answer.code for answer in answers] == [0] * len(answers), answers
    return Finished(folder, answers, torch.load(folder / RUN / LAST, weights_only=True))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run that nothing happened to."""
    return finish_by(by_lightning, tmp_path_factory.mktemp("uninterrupted"))


def assert_same_end(found: Any, expected: Finished) -> None:
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        torch.testing.assert_close(found[key], expected.checkpoint[key], rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_fit_keeps_one_run_for_two_processes(
    way: Callable[[Path], list[Answer]], uninterrupted: Finished, tmp_path: Path
) -> None:
    run = uninterrupted if way is by_lightning else finish_by(way, tmp_path)
    out = [line for answer in run.answers for line in answer.out]
    assert out[0] == f"nm: 75 K parameters, 7 L1BatchNorm2d, 32-true, cpu × 2 → {RUN}"
    assert {f" run         {RUN}", f" checkpoint  {RUN / LAST}"} < set(out)
    assert sum("images/s in training" in line for line in out) == 1
    said = [x for answer in run.answers for x in answer.err if x.startswith(("nm", "NormSwap"))]
    swapped, served = said
    assert swapped == "NormSwap: swapped 7 BatchNorm2d → L1BatchNorm2d"
    assert served.startswith("NormSwap: 7 L1BatchNorm2d by ")
    assert [path.name for path in (run.folder / RUN.parent).iterdir()] == ["version_0"]
    files = sorted(path.name.split(".")[0] for path in (run.folder / RUN).iterdir())
    assert files == ["checkpoints", "config", "events", "hparams", "weight_norms"]
    assert_same_end(run.checkpoint, uninterrupted)


@slow
def test_fit_resumes_a_sharded_network(tmp_path: Path) -> None:
    """Under FSDP2 with Lightning's default, a checkpoint that is a folder."""
    strategy = ["--trainer.strategy", "ModelParallelStrategy", "--ckpt_path", "last"]
    sizes = ["--trainer.strategy.data_parallel_size=2", "--trainer.strategy.tensor_parallel_size=1"]
    smooth = ["--trainer.max_epochs", "1", "--model.label_smoothing", "0.25"]
    first = finish(start(*NM, *TWO, *strategy, *sizes, *smooth, folder=tmp_path))
    second = finish(start(*NM, *TWO, *strategy, *sizes, folder=tmp_path))
    assert (first.code, second.code) == (0, 0), second.err
    assert (tmp_path / RUN / LAST).is_dir()
    assert f" checkpoint  {RUN / LAST}" in first.out
    assert f"nm: --ckpt_path last is {RUN / LAST}" in second.err
    assert any(line.startswith(" 1 epoch after 1 of an earlier run in ") for line in second.out)
    config = (tmp_path / RUN.parent / "version_1" / "config.yaml").read_text()
    assert "label_smoothing: 0.25" in config


# ---- when one ends ----


@slow
def test_fit_restarts_a_killed_rank(uninterrupted: Finished, tmp_path: Path) -> None:
    (tmp_path / "fates.py").write_text(FATES)
    answer = finish(
        start(
            *(*TORCHRUN, "--standalone", "--max-restarts", "1", "--nproc-per-node", "2"),
            *(*NM[1:], *TWO, "--ckpt_path", "last"),
            *("--trainer.callbacks+", "fates.Fate", "--trainer.callbacks.how", "SIGKILL"),
            folder=tmp_path,
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        )
    )
    assert answer.code == 0, answer.err
    said = [line for line in answer.err if line.startswith("nm")]
    assert said[0] == "nm: runs/quickstart has no checkpoint yet, so training starts anew."
    assert said[1].startswith("nm (rank 0): lost another process, which may have said why. Here: ")
    assert said[2:] == [
        f"nm (rank 0): the last checkpoint is {RUN / LAST}.",
        f"nm: --ckpt_path last is {RUN / LAST}",
    ]
    assert any(line.startswith(" 1 epoch after 1 of an earlier run in ") for line in answer.out)
    resumed = torch.load(tmp_path / RUN.parent / "version_1" / LAST, weights_only=True)
    assert_same_end(resumed, uninterrupted)


def assert_says_that_one_is_lost(answer: Answer, why: str) -> None:
    assert answer.code == LOST_PROCESS, answer
    first, second = (line for line in answer.err if line.startswith("nm (rank 0)"))
    assert re.search(why, first)
    assert second == f"nm (rank 0): the last checkpoint is {RUN / LAST}."
    assert not any("Traceback" in line for line in answer.err)


@slow
def test_fit_loses_a_silent_rank_after_the_timeout(tmp_path: Path) -> None:
    (tmp_path / "fates.py").write_text(FATES)
    timeout = ["--trainer.strategy", "DDPStrategy", "--trainer.strategy.timeout", "0:00:20"]
    fate = ["--trainer.callbacks+", "fates.Fate", "--trainer.callbacks.how", "SIGSTOP"]
    first, silent = start_by_slurm([tmp_path] * 2, *timeout, *fate)
    try:
        assert_says_that_one_is_lost(finish(first), "Timed out waiting 20000ms|pair closure")
        assert silent.poll() is None
    finally:
        silent.kill()
        silent.communicate()


@slow
def test_fit_ends_all_ranks_on_an_error_of_one(tmp_path: Path) -> None:
    (tmp_path / "fates.py").write_text(FATES)
    fate = ["--trainer.callbacks+", "fates.Fate", "--trainer.callbacks.how", "raise"]
    answer = finish(start(*NM, *TWO, *fate, folder=tmp_path))
    assert_says_that_one_is_lost(answer, "closed by peer|reset by peer")
    assert "nm (rank 1): 7.jpg is no image." in answer.err


@slow
def test_fit_ends_both_ranks_on_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "fates.py").write_text(FATES.replace("os.getpid()", "0"))
    answer = finish(
        start(
            *(*NM, *TWO, "--trainer.callbacks+", "fates.Fate"),
            *("--trainer.callbacks.how", "SIGINT"),
            folder=tmp_path,
        )
    )
    assert answer.code == INTERRUPTED, answer
    assert [line for line in answer.err if "nm" in line] == [
        "nm: interrupted; the last checkpoint is kept. To resume:",
        f"nm fit --config {RUN}/config.yaml \\",
    ]


@slow
def test_fit_refuses_ranks_with_different_checkpoints(tmp_path: Path) -> None:
    """As on two nodes of which one does not see the runs of the other."""
    here, there = tmp_path / "here", tmp_path / "there"
    (here / RUN / LAST.parent).mkdir(parents=True)
    there.mkdir()
    torch.save({}, here / RUN / LAST)
    tasks = start_by_slurm([here, there], "--ckpt_path", "last")
    answers = [finish(task) for task in tasks]
    assert [answer.code for answer in answers] == [BAD_INPUT] * 2, answers
    for answer, name in zip(answers, ("nm", "nm (rank 1)"), strict=True):
        assert answer.err[-1] == (
            f"{name}: --ckpt_path: rank 0 starts from {RUN / LAST}, rank 1 from None: let all "
            "nodes share the folder of the runs, or give the path of a checkpoint."
        )
    assert not any((here / RUN.parent / "version_1").glob("*"))
